"""The one place where it is decided whether a text passes: every endpoint asks here, and whatever goes wrong blocks."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guardtrain.serve.logs import described
from guardtrain.serve.verdict import Failure, Status, Verdict
from guardtrain.types import Label

if TYPE_CHECKING:
    from guardtrain.serve.guard import Guard
    from guardtrain.serve.metrics import Metrics
    from guardtrain.serve.reasons import Reasons
    from guardtrain.serve.record import Lifecycle
    from guardtrain.serve.settings import ServeSettings
    from guardtrain.serve.untrusted import Piece

# Of one request at a time: a long conversation must not fill the queue that all share.
SLICE = 16
# Behind the guard's own clock: for one that hangs.
GRACE_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judged:
    """A piece and what became of it. id: under which its reason can be asked for. fails_open: which failures let it pass."""

    id: str
    piece: Piece
    verdict: Verdict
    fails_open: frozenset[Failure]

    @property
    def blocks(self) -> bool:
        """Whether it must not pass (shadow mode lets it, and says so)."""
        return self.verdict.blocks(self.fails_open)

    @property
    def failed_open(self) -> bool:
        """It passes, and nobody has judged it."""
        return self.verdict.decision is None and not self.blocks

    def to_json(self) -> dict[str, Any]:
        """For whoever sent the text. Score and reason are not for them: both would teach an attacker."""
        shown = {"id": self.id, "where": self.piece.where, "role": self.piece.role, "blocked": self.blocks}
        return {**shown, "decision": self.verdict.decision, "status": self.verdict.status, "failure": self.verdict.failure}


class Gate:
    """Asks the guard, counts, and remembers what was blocked without a reason."""

    def __init__(self, guard: Guard, settings: ServeSettings, metrics: Metrics, reasons: Reasons, lifecycle: Lifecycle) -> None:
        self.guard, self.settings, self.metrics, self.reasons, self.lifecycle = guard, settings, metrics, reasons, lifecycle

    async def judge(self, pieces: Sequence[Piece], *, mode: str | None = None, stops: bool = False) -> list[Judged]:
        """Each piece judged, in order. stops: once one blocks, those behind it are left out. Never raises for a failure."""
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_seconds
        judged: list[Judged] = []
        for first in range(0, len(pieces), SLICE):
            some = pieces[first : first + SLICE]
            verdicts = await self._verdicts(some, mode or self.settings.mode, deadline)
            judged += [self._judged(piece, verdict) for piece, verdict in zip(some, verdicts, strict=True)]
            if stops and any(each.blocks for each in judged):
                break
        return judged

    async def _verdicts(self, pieces: Sequence[Piece], mode: str | None, deadline: float) -> list[Verdict]:
        readable = [piece.prompt for piece in pieces if piece.text is not None]
        found = iter(await self._asked(readable, mode, deadline) if readable else [])
        return [self._without(Failure.UNREADABLE, mode) if piece.text is None else next(found) for piece in pieces]

    async def _asked(self, prompts: list[Any], mode: str | None, deadline: float) -> list[Verdict]:
        """The guard's verdicts; one that hangs or breaks its word gives none, and none never passes by itself."""
        if not self.lifecycle.is_started:
            return [self._without(Failure.MODEL, mode)] * len(prompts)
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            return [self._without(Failure.TIMEOUT, mode)] * len(prompts)
        try:
            async with asyncio.timeout(left + GRACE_SECONDS):
                return await self.guard.acheck_many(prompts, mode=mode, timeout_seconds=left)
        except TimeoutError:
            return [self._without(Failure.TIMEOUT, mode)] * len(prompts)
        except Exception as error:
            logger.error("the guard raised", extra={"fields": described(error)})
            return [self._without(Failure.MODEL, mode)] * len(prompts)

    def _without(self, failure: Failure, mode: str | None) -> Verdict:
        status = Status.TIMEOUT if failure is Failure.TIMEOUT else Status.ERROR
        version = self.guard.threshold_version
        return Verdict(decision=None, status=status, failure=failure, mode=mode, model=self.guard.name, threshold_version=version)

    def _judged(self, piece: Piece, verdict: Verdict) -> Judged:
        judged = Judged(secrets.token_hex(16), piece, verdict, self.settings.fails_open)
        self.metrics.count(judged, is_shadow=self.settings.is_shadow)
        if verdict.decision is Label.MALICIOUS and verdict.reason is None:
            self.reasons.keep(judged.id, piece)
        return judged
