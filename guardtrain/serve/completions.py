"""The model on a server that speaks OpenAI's `/v1/completions` with log-probabilities: vLLM, SGLang, llama.cpp's server.

What is sent are token ids, never text: a server reads `<|im_end|>` in a text as the end of a turn, whoever wrote it. The policy
and the prompt stand first in every request, so that a server with prefix caching reads them once. Its log-probabilities are those
of the whole vocabulary; their difference is that of the logits, and renormalised over both labels it is the same number.

2026-11: vLLM gives the log-probabilities of `logprob_token_ids`, other servers of the likeliest tokens only. A label that is not
among them is an error: no score is made up.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

from guardtrain.data.template import GuardTemplate, VerdictIds
from guardtrain.errors import ServeError
from guardtrain.inference.reason import Reason
from guardtrain.inference.scored import Prompt, Question, Scored
from guardtrain.serve.backend import NoAnswer
from guardtrain.serve.facts import GuardFacts
from guardtrain.types import Label, Mode

# The most that vLLM gives where it is not told otherwise; where a label is not among them, more are asked of others.
TOP_LOGPROBS = (20, 5_000)
CONNECT_SECONDS = 10.0


class CompletionsBackend:
    """A guard whose weights are on a server. It batches; what is sent at once is bounded.

    model: the guard's folder, for its tokenizer, policy and thresholds. base_url: up to and with /v1. served_model: its name
    there; the only one that the server has if absent. concurrency: requests at once.
    """

    restarts = 0

    def __init__(
        self, model: str, base_url: str, *, api_key: str | None, policy: str | None, concurrency: int, timeout_seconds: float
    ) -> None:
        self._model, self._policy = model, policy
        self._url, self._key, self._timeout = base_url.rstrip("/"), api_key, timeout_seconds
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="guard-completions", daemon=True)
        self._room = asyncio.Semaphore(concurrency)
        self._is_reachable = False
        self._served = ""

    @property
    def is_ready(self) -> bool:
        """Whether the server answered when it was last asked."""
        return self._is_reachable

    def start(self) -> GuardFacts:
        """Read the guard's settings and ask the server what it serves. Raises ModelError, ServeError."""
        import httpx2

        from guardtrain.inference.guards import load_settings

        if self._thread.ident is not None:
            raise ServeError("the guard was started already")
        self._tokenizer, self._settings = load_settings(self._model, policy=self._policy)
        self._template = GuardTemplate(self._tokenizer, self._settings.policy)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(self._timeout, connect=CONNECT_SECONDS))
        self._thread.start()
        try:
            self._served = asyncio.run_coroutine_threadsafe(self._ask_served(), self._loop).result()
        except ServeError:
            self.close()
            raise
        return GuardFacts.of(self._settings, self._template.encoder)

    def submit(self, prompt: Prompt, question: Question) -> Future[Scored]:
        """Score one piece."""
        if self._loop.is_closed() or not self._thread.is_alive():
            future: Future[Scored] = Future()
            future.set_exception(NoAnswer("the guard is closed"))
            return future
        return asyncio.run_coroutine_threadsafe(self._score(prompt, question), self._loop)

    def close(self) -> None:
        """End; requests under way are broken off."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _ask_served(self) -> str:
        """The name of the one model that is served. Raises ServeError."""
        try:
            names = [str(each["id"]) for each in (await self._ask("GET", "/models"))["data"]]
        except (NoAnswer, KeyError, TypeError) as error:
            raise ServeError("the model server cannot be used", where=self._url, found=str(error)) from error
        if len(names) != 1:
            raise ServeError("which model?", where=self._url, expected="a server of one model", found=", ".join(names) or "none")
        return names[0]

    async def _score(self, prompt: Prompt, question: Question) -> Scored:
        template = self._template
        ids = [*template.policy_ids, *template.prompt_segment(prompt).input_ids]
        scored = Scored({}, {})
        async with self._room:
            if Mode.OFF in question.modes:
                scored = await self._verdict(Mode.OFF, ids, template.off_verdict)
            if question.escalates(scored.scores.get(Mode.OFF, 0.0)):
                scored = scored.joined(await self._reasoned([*ids, *template.opening_ids]))
        return scored

    async def _reasoned(self, ids: list[int]) -> Scored:
        """A reason, and the verdict behind it. A reason that was cut is closed by force."""
        template, cap = self._template, self._settings.max_reason_tokens
        end = template.reason_end()
        body = {"prompt": ids, "max_tokens": cap + len(end), "stop": [template.encoder.text(end)], "return_token_ids": True}
        reason = Reason.of(template, cap)
        reason.take_all(self._written(await self._complete(body), end))
        on = await self._verdict(Mode.ON, [*ids, *reason.ids], template.on_verdict)
        is_natural = {Mode.ON: on.is_natural[Mode.ON] and not reason.is_cut}
        return Scored(on.scores, is_natural, template.encoder.text(reason.ids).strip(), reason.is_cut)

    def _written(self, choice: dict[str, Any], end: list[int]) -> list[int]:
        """The tokens of a text that was written: vLLM tells them, of other servers' text they are found anew."""
        try:
            if choice.get("token_ids"):
                return list(choice["token_ids"])
            has_ended = choice["finish_reason"] != "length"
            return [*self._template.encoder.plain(choice["text"]), *(end if has_ended else [])]
        except (KeyError, TypeError) as error:
            raise NoAnswer("the server's answer holds no text") from error

    async def _verdict(self, mode: Mode, ids: list[int], verdict: VerdictIds) -> Scored:
        labels = [verdict.labels[label][0] for label in (Label.MALICIOUS, Label.BENIGN)]
        body = {
            "prompt": [*ids, *verdict.prefix],
            "max_tokens": 1,
            "logprob_token_ids": labels,
            "return_tokens_as_token_ids": True,
        }
        for number in TOP_LOGPROBS:
            likeliest = top_logprobs(await self._complete({**body, "logprobs": number}))
            of_labels = [logprob_of(token, self._template.encoder.text([token]), likeliest) for token in labels]
            if None not in of_labels:
                break
        score = renormalised(of_labels)
        return Scored({mode: score}, {mode: max(likeliest.values()) in of_labels})

    async def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._ask("POST", "/completions", json={"model": self._served, "temperature": 0.0, **body})
        try:
            choice: dict[str, Any] = answer["choices"][0]
        except (LookupError, TypeError) as error:
            raise NoAnswer("the server's answer holds no choice") from error
        return choice

    async def _ask(self, method: str, path: str, **body: Any) -> Any:
        """What the server answers, as JSON. Raises NoAnswer, which holds nothing that was sent."""
        import httpx2

        try:
            response = await self._client.request(method, self._url + path, **body)
            self._is_reachable = response.status_code == 200
            if not self._is_reachable:
                raise NoAnswer(f"the model server answered {response.status_code}")
            return response.json()
        except httpx2.HTTPError as error:
            self._is_reachable = False
            raise NoAnswer(f"the model server cannot be reached: {type(error).__name__}") from error
        except ValueError as error:
            raise NoAnswer("the model server's answer is no JSON") from error


def top_logprobs(choice: dict[str, Any]) -> dict[str, float]:
    """The log-probabilities of the first token that was written, by token: as vLLM spells them, or as llama.cpp does.

    A token is its text, or "token_id:" and its number. Raises NoAnswer where there are none.
    """
    try:
        logprobs = choice["logprobs"]
        if logprobs.get("top_logprobs"):
            return {str(token): float(value) for token, value in logprobs["top_logprobs"][0].items()}
        entries = logprobs["content"][0]["top_logprobs"]
        return {f"token_id:{entry['id']}" if "id" in entry else entry["token"]: float(entry["logprob"]) for entry in entries}
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise NoAnswer("the server's answer holds no log-probabilities") from error


def logprob_of(token: int, text: str, logprobs: dict[str, float]) -> float | None:
    """The log-probability of a token by its number or its text, None where it is missing."""
    return next((logprobs[spelling] for spelling in (f"token_id:{token}", text) if spelling in logprobs), None)


def renormalised(of_labels: list[float | None]) -> float:
    """The score of the log-probabilities of malicious and benign. Raises NoAnswer where one is missing: none is made up."""
    malicious, benign = of_labels
    if malicious is None or benign is None:
        raise NoAnswer("the server gave no log-probability of a label")
    return malicious - benign
