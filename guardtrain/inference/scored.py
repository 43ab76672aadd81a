"""What a guard says of one prompt, in numbers: no torch, for those who only read it."""

from __future__ import annotations

from dataclasses import dataclass

from guardtrain.types import Mode, Turn

Prompt = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a guard says of one prompt.

    scores: by mode that was run, logit(malicious) - logit(benign).
    reason: the sentence written in mode `on`, else None.
    truncated: the reason hit the token cap and was closed by force.
    is_natural: in each mode that was run, whether the most likely token of all at the verdict position is one of the labels,
    and in mode `on` whether the reason ended by itself; a free-running server would have given no verdict otherwise.
    """

    scores: dict[Mode, float]
    is_natural: dict[Mode, bool]
    reason: str | None = None
    truncated: bool = False

    def joined(self, on: Scored | None) -> Scored:
        """This, and what mode `on` says where it was run."""
        if on is None:
            return self
        return Scored({**self.scores, **on.scores}, {**self.is_natural, **on.is_natural}, on.reason, on.truncated)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of one prompt.

    modes: to be run. band: scores of mode `off`, low <= score < high, in which mode `on` is run too; in all if absent.
    """

    modes: frozenset[Mode]
    band: tuple[float, float] | None = None

    @property
    def always_reasons(self) -> bool:
        """Whether mode `on` is run whatever mode `off` says."""
        return Mode.ON in self.modes and (self.band is None or Mode.OFF not in self.modes)

    def escalates(self, off_score: float) -> bool:
        """Whether mode `on` is run behind this score."""
        if Mode.ON not in self.modes or self.band is None:
            return Mode.ON in self.modes
        return self.band[0] <= off_score < self.band[1]
