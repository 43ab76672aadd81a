"""A running server's guard, with the methods of a local one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Self

import httpx2

from guardtrain.data.turns import BrokenTurns, read_turns
from guardtrain.errors import ServeError
from guardtrain.serve.settings import parse_url
from guardtrain.serve.verdict import Failure, Status, Verdict
from guardtrain.types import Label, Turn, prompt_text

Prompt = str | Sequence[Mapping[str, Any] | Turn]
FIELDS = {field.name for field in fields(Verdict)}
# Of a server that says no more than its status: a proxy in between, or one that is ending.
BY_STATUS = {413: Failure.TOO_LONG, 429: Failure.OVERLOADED, 504: Failure.TIMEOUT}


class RemoteGuard:
    """Asks `guardtrain serve` at `url`. As with a local guard a failure is a verdict without a decision.

    Raises ServeError for a key or an address that the server refuses: that is no outage, and never fails open.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_seconds: float = 30.0) -> None:
        self.name = parse_url("url", url).removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        options: dict[str, Any] = {"base_url": self.name, "headers": headers, "timeout": timeout_seconds}
        self._client, self._async_client = httpx2.Client(**options), httpx2.AsyncClient(**options)

    def check(self, prompt: Prompt) -> Verdict:
        """Judge a text or a conversation."""
        start = time.perf_counter()
        try:
            answer = self._client.post("/v1/moderations", json={"input": _text(prompt)})
        except (httpx2.TransportError, BrokenTurns) as error:
            return self._failed(error, start)
        return self._read(answer, start)

    async def acheck(self, prompt: Prompt) -> Verdict:
        """As `check`."""
        start = time.perf_counter()
        try:
            answer = await self._async_client.post("/v1/moderations", json={"input": _text(prompt)})
        except (httpx2.TransportError, BrokenTurns) as error:
            return self._failed(error, start)
        return self._read(answer, start)

    def check_many(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge each prompt; verdicts in their order."""
        return [self.check(prompt) for prompt in prompts]

    async def acheck_many(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """As `check_many`, all at once."""
        return list(await asyncio.gather(*map(self.acheck, prompts)))

    def close(self) -> None:
        """Close the connections of `check`."""
        self._client.close()

    async def aclose(self) -> None:
        """Close all connections."""
        self.close()
        await self._async_client.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, answer: httpx2.Response, start: float) -> Verdict:
        try:
            body = answer.json()
            ours = body["results"][0]["guardtrain"] if answer.status_code == 200 else body.get("guardtrain", {})
            if answer.status_code in {401, 403, 404, 405} or not isinstance(ours, dict):
                raise ServeError("the guard's server refused", where=self.name, found=f"status {answer.status_code}")
            failure = Failure(ours["failure"]) if ours.get("failure") else None
            decision = Label(ours["decision"]) if answer.status_code == 200 and ours["decision"] else None
            known = {name: value for name, value in ours.items() if name in FIELDS}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            failure, decision, known = None, None, {}
        if decision is None:
            failure = failure or BY_STATUS.get(answer.status_code, Failure.MODEL)
            return self._without(failure, start)
        known |= {"decision": decision, "failure": None, "status": Status(known["status"]), "latency_ms": _since(start)}
        return Verdict(**known)

    def _failed(self, error: Exception, start: float) -> Verdict:
        if isinstance(error, BrokenTurns):
            return self._without(Failure.UNREADABLE, start)
        return self._without(Failure.TIMEOUT if isinstance(error, httpx2.TimeoutException) else Failure.MODEL, start)

    def _without(self, failure: Failure, start: float) -> Verdict:
        status = Status.TIMEOUT if failure is Failure.TIMEOUT else Status.ERROR
        return Verdict(decision=None, status=status, failure=failure, latency_ms=_since(start), model=self.name)


def _text(prompt: Prompt) -> str:
    """What a local guard would read. Raises BrokenTurns."""
    turns = [{"role": turn.role, "content": turn.content} if isinstance(turn, Turn) else turn for turn in prompt]
    return prompt_text(read_turns(prompt if isinstance(prompt, str) else turns))


def _since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)
