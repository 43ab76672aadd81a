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
