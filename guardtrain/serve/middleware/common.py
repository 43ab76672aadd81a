"""What the middlewares share: a guard from a guard or a URL, and the error of a block."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from guardtrain.errors import ServeError
from guardtrain.serve.refusals import Refusal, of_failure
from guardtrain.serve.untrusted import Piece
from guardtrain.serve.verdict import Failure, Status, Verdict

if TYPE_CHECKING:
    from guardtrain.serve.remote import Prompt


class Checks(Protocol):
    """What judges: `Guard`, and `RemoteGuard`."""

    def check_many(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge each prompt."""

    async def acheck_many(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge each prompt."""


class GuardBlocked(ServeError):
    """A text that must not go on. verdict: says why, also where there is no decision. piece: the text and where it stood."""

    def __init__(self, piece: Piece, verdict: Verdict) -> None:
        what = "malicious" if verdict.failure is None else f"no verdict ({verdict.failure}), and nothing passes unchecked"
        super().__init__(f"blocked by the guard: {what}", where=piece.where)
        self.piece, self.verdict = piece, verdict


class Gatekeeper:
    """Raises GuardBlocked for the first text that must not go on. fails_open: failures that let a text pass."""

    def __init__(self, guard: Checks | str, *, api_key: str | None = None, fails_open: Collection[Failure] = ()) -> None:
        self.guard = _remote(guard, api_key) if isinstance(guard, str) else guard
        self.fails_open = frozenset(fails_open)

    def admit(self, pieces: Sequence[Piece]) -> None:
        """Check texts. Raises GuardBlocked, ServeError."""
        readable = [piece for piece in pieces if piece.text is not None]
        self._decide(pieces, self.guard.check_many([piece.prompt for piece in readable]) if readable else [])

    async def aadmit(self, pieces: Sequence[Piece]) -> None:
        """As `admit`."""
        readable = [piece for piece in pieces if piece.text is not None]
        self._decide(pieces, await self.guard.acheck_many([piece.prompt for piece in readable]) if readable else [])

    def _decide(self, pieces: Sequence[Piece], verdicts: Sequence[Verdict]) -> None:
        rest = iter(verdicts)
        for piece in pieces:
            verdict = _unreadable() if piece.text is None else next(rest)
            if verdict.blocks(self.fails_open):
                raise GuardBlocked(piece, verdict)


def refusal_of(error: ServeError) -> Refusal:
    """A block, or a guard that gave no verdict, as an answer."""
    if isinstance(error, GuardBlocked) and error.verdict.failure is None:
        return Refusal(400, "content_blocked", "The guard has blocked this request.", param=error.piece.where)
    failure = error.verdict.failure if isinstance(error, GuardBlocked) else None
    return of_failure(failure or Failure.MODEL, error.where or "body")


def _unreadable() -> Verdict:
    return Verdict(decision=None, status=Status.ERROR, failure=Failure.UNREADABLE)


def _remote(url: str, api_key: str | None) -> Checks:
    from guardtrain.serve.remote import RemoteGuard

    return RemoteGuard(url, api_key=api_key)
