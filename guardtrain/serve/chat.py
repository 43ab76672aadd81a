"""The model on a server that speaks OpenAI's `/v1/chat/completions` alone, and runs freely: it writes its reason and its verdict.

Nothing can be forced there. A verdict that does not come, or comes in other words, is none. The server renders the chat template,
so a prompt that holds the text of one of the model's special tokens is not sent: the server would take it for the real one.
`/v1/completions` is better where there is one.

2026-11: vLLM has renamed the field of the reason from `reasoning_content` to `reasoning`; others kept the old name. Where no
reasoning parser is set it stands in the content, between its tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardtrain.data.template import NATIVE_THINK, VERDICT
from guardtrain.errors import ConfigError
from guardtrain.inference.parser import NO_ANSWER, Answer, parse_answer
from guardtrain.inference.scored import Prompt, Question, Scored
from guardtrain.serve.backend import NoAnswer
from guardtrain.serve.completions import CompletionsBackend, logprob_of, renormalised
from guardtrain.serve.facts import GuardFacts
from guardtrain.types import Label, Mode, prompt_text

TOP_LOGPROBS = 20  # the most that OpenAI's API gives
CLOSING_TOKENS = 16  # behind the reason: its closing, "Verdict:" and the label


class ChatBackend(CompletionsBackend):
    """As CompletionsBackend, over chat completions. Mode `off` needs a template that can switch thinking off (Qwen3's)."""

    def start(self) -> GuardFacts:
        """Read the guard's settings and ask the server what it serves. Raises ModelError, ServeError, ConfigError."""
        facts = super().start()
        if self._template.think != NATIVE_THINK:
            facts = facts.with_modes(("on",))
        if not facts.modes:
            raise ConfigError("a chat server runs freely", where="backend", expected="a guard with mode on", found="off")
        self._special = sorted(text for text in self._tokenizer.get_added_vocab() if text.strip())
        return facts

    async def _score(self, prompt: Prompt, question: Question) -> Scored:
        text = prompt_text(prompt)
        if any(special in text for special in self._special):
            raise NoAnswer("the prompt holds the text of a special token, which a chat server would take for the real one")
        scored = Scored({}, {})
        async with self._room:
            if Mode.OFF in question.modes:
                scored = await self._judged(Mode.OFF, text)
            if question.escalates(scored.scores.get(Mode.OFF, 0.0)):
                scored = scored.joined(await self._judged(Mode.ON, text))
        return scored

    async def _judged(self, mode: Mode, text: str) -> Scored:
        body = {
            "model": self._served,
            "messages": [{"role": "system", "content": self._settings.policy}, {"role": "user", "content": text}],
            "temperature": 0.0,
            "max_tokens": self._settings.max_reason_tokens + CLOSING_TOKENS,
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
            "chat_template_kwargs": {"enable_thinking": mode is Mode.ON},
        }
        answer = await self._ask("POST", "/chat/completions", json=body)
        texts = {label: self._template.encoder.text(ids[:1]) for label, ids in self._template.on_verdict.labels.items()}
        reason, score = read_choice(answer, texts)
        return Scored({mode: score}, {mode: True}, reason if mode is Mode.ON else None)


def read_choice(answer: Any, label_texts: dict[Label, str]) -> tuple[str | None, float]:
    """The reason and the score of a chat completion. label_texts: each label's first token.

    Raises NoAnswer for anything but one clear verdict with the log-probabilities of both labels where it was decided.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        entries = choice["logprobs"]["content"]
        parsed = _parsed(message)
        place = _place_of_verdict([str(entry["token"]) for entry in entries])
        likeliest = {each["token"]: float(each["logprob"]) for each in entries[place]["top_logprobs"]}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise NoAnswer("the server's answer holds no verdict with log-probabilities") from error
    if parsed.verdict is None:
        raise NoAnswer("the model gave no clear verdict")
    of_labels = [logprob_of(-1, label_texts[label], likeliest) for label in (Label.MALICIOUS, Label.BENIGN)]
    return parsed.reason, renormalised(of_labels)


def _parsed(message: dict[str, Any]) -> Answer:
    """The answer, as it would stand in one text: the reason comes in a field of either name, or in the content."""
    content = str(message.get("content") or "")
    reason = message.get("reasoning_content") or message.get("reasoning") or ""
    if "<think>" in content or "</think>" in content:
        return NO_ANSWER if reason else parse_answer(content)
    return parse_answer(f"<think>{reason}</think>\n{content.strip()}")


def _place_of_verdict(tokens: Sequence[str]) -> int:
    """The index of the token behind the last "Verdict:". Raises LookupError where there is none."""
    text = "".join(tokens)
    place = text.rindex(VERDICT) + len(VERDICT)
    length = 0
    for index, token in enumerate(tokens):
        if length >= place:
            return index
        length += len(token)
    raise LookupError
