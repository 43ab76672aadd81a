"""A reason while it is written: when it ends, and what of it is kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from guardtrain.data.template import GuardTemplate


@dataclass(slots=True)
class Reason:
    """Takes tokens until the reason closes its think block, ends the turn or reaches the cap.

    stops, end: the template's `reason_stops` and `reason_end`. max_tokens: the cap; beyond it only an end that has begun goes on.
    ids: the reason, without what ended it. is_cut: the cap closed it. held: how many tokens of `end` were written, but for the
    last, which completes it and need not be computed any more.
    """

    stops: set[int]
    end: list[int]
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    is_cut: bool = False
    held: int = 0

    @classmethod
    def of(cls, template: GuardTemplate, max_tokens: int) -> Reason:
        """An empty one."""
        return cls(template.reason_stops(), template.reason_end(), max_tokens)

    def take(self, token: int) -> bool:
        """Take the next token; whether the reason goes on behind it."""
        if token in self.stops:
            return False
        self.ids.append(token)
        if self.ids[-len(self.end) :] == self.end:
            del self.ids[-len(self.end) :]
            self.held = len(self.end) - 1
            return False
        beyond = self.ids[self.max_tokens :]
        if beyond != self.end[: len(beyond)]:
            self.is_cut = True
            self.ids.pop()
        return not self.is_cut

    def take_all(self, tokens: Iterable[int]) -> None:
        """Take tokens as far as the reason goes; one that is still going on behind the last is cut."""
        if all(self.take(token) for token in tokens):
            self.is_cut = True
            del self.ids[self.max_tokens :]
