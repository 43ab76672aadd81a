"""Reasons that follow later: a text that was blocked at once is explained when somebody asks why."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardtrain.serve.refusals import Refusal, of_failure
from guardtrain.serve.verdict import Verdict

if TYPE_CHECKING:
    from guardtrain.serve.guard import Guard
    from guardtrain.serve.untrusted import Piece

MAX_ENTRIES = 1024
MAX_CHARACTERS = 4_000_000  # of all texts that are held
MAX_SECONDS = 600.0


@dataclass
class _Blocked:
    piece: Piece
    since: float
    answer: asyncio.Task[Verdict] | None = None


class Reasons:
    """Holds blocked texts for ten minutes, the newest of them, and lets the guard explain one when it is asked for."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._blocked: OrderedDict[str, _Blocked] = OrderedDict()
        self._characters = 0

    @property
    def are_possible(self) -> bool:
        """Whether this guard can reason at all."""
        return "on" in self.guard.modes

    def __contains__(self, judged_id: str) -> bool:
        return judged_id in self._blocked

    def keep(self, judged_id: str, piece: Piece) -> None:
        """Hold a text; old ones go when there are too many."""
        if not self.are_possible:
            return
        self._blocked[judged_id] = _Blocked(piece, time.monotonic())
        self._characters += len(piece.text or "")
        while self._blocked and self._has_to_go(next(iter(self._blocked.values()))):
            self._drop(next(iter(self._blocked)))

    def ask(self, judged_id: str) -> Verdict | None:
        """The explained verdict, None while it is being written. Raises Refusal for what is not held, or not explained."""
        blocked = self._blocked.get(judged_id)
        if blocked is None or time.monotonic() - blocked.since > MAX_SECONDS:
            raise Refusal(404, "no_such_reason", "Nothing that was blocked in the last ten minutes has this id.", param="id")
        if blocked.answer is None:
            blocked.answer = asyncio.create_task(self.guard.explain(blocked.piece.prompt))
        if not blocked.answer.done():
            return None
        verdict = blocked.answer.result()
        if verdict.failure is not None:
            blocked.answer = None  # to be asked for again
            raise of_failure(verdict.failure, "id")
        return verdict

    def close(self) -> None:
        """End what is being written."""
        for judged_id in list(self._blocked):
            self._drop(judged_id)

    def _has_to_go(self, oldest: _Blocked) -> bool:
        is_old = time.monotonic() - oldest.since > MAX_SECONDS
        return is_old or len(self._blocked) > MAX_ENTRIES or self._characters > MAX_CHARACTERS

    def _drop(self, judged_id: str) -> None:
        blocked = self._blocked.pop(judged_id)
        self._characters -= len(blocked.piece.text or "")
        if blocked.answer is not None:
            blocked.answer.cancel()
