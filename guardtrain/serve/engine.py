"""The loop around a model: what waits is read together, what is read is written on together, and results leave as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from guardtrain.inference.scored import Prompt, Question, Scored
from guardtrain.types import Mode


class Live(Protocol):
    """What scores prompts that come one by one: `LiveScorer`."""

    def __len__(self) -> int:
        """Reasons that are being written."""

    @property
    def is_reading(self) -> bool:
        """Whether the rest of a long prompt is to be read before anything else can be."""

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether reasons behind prompts of so many tokens could be written beside those that are."""

    def turn(self, prompts: Sequence[tuple[int, list[int], Question]]) -> list[tuple[int, Scored]]:
        """Read these prompts, or the next part of a long one, and write one token of every reason; what is done now."""

    def drop(self, names: Sequence[int]) -> None:
        """Forget these."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A piece to be scored, under a name of the caller's."""

    name: int
    prompt: Prompt
    question: Question


@dataclass(frozen=True, slots=True)
class Drop:
    """Nobody waits for this piece any more."""

    name: int


Order = Ask | Drop | None  # None: end
Inbox = SimpleQueue[Order]


class Engine:
    """Decides what the model does next.

    encode: a piece as tokens. max_batch: pieces read at once, and reasons written at once. batch_tokens: of pieces read at once,
    but for a longer one, which is read alone; half of it while reasons are being written, so that these go on.
    """

    def __init__(self, live: Live, encode: Callable[[Prompt], list[int]], *, max_batch: int, batch_tokens: int) -> None:
        self.live, self.encode, self.max_batch, self.batch_tokens = live, encode, max_batch, batch_tokens
        self._waiting: dict[int, tuple[list[int], Question]] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not len(self.live) and not self.live.is_reading

    def obey(self, order: Ask | Drop) -> None:
        """Take a piece in, or let it go."""
        if isinstance(order, Ask):
            self._waiting[order.name] = self.encode(order.prompt), order.question
        elif self._waiting.pop(order.name, None) is None:
            self.live.drop([order.name])

    def turn(self) -> list[tuple[int, Scored]]:
        """Read what waits, as far as there is room, and write one token of each reason. Returns what is done."""
        return self.live.turn([] if self.live.is_reading else self._batch())

    def _batch(self) -> list[tuple[int, list[int], Question]]:
        """The pieces that waited longest, at least one where there is room for any."""
        batch: list[tuple[int, list[int], Question]] = []
        left = self.batch_tokens // 2 if len(self.live) else self.batch_tokens
        reasoned: list[int] = []
        for name, (ids, question) in self._waiting.items():
            left -= len(ids)
            reasoned += [len(ids)] * (Mode.ON in question.modes)
            is_full = len(self.live) + len(batch) >= self.max_batch or (batch and left < 0)
            if is_full or (reasoned and not self.live.has_room(reasoned)):
                break
            batch.append((name, ids, question))
        for name, _, _ in batch:
            del self._waiting[name]
        return batch


def run(engine: Engine, inbox: Inbox, done: Callable[[list[tuple[int, Scored]]], None]) -> None:
    """Work until the inbox says that it is the end. done: is told what is done after every turn, nothing too: a sign of life."""
    while True:
        while True:
            try:
                order = inbox.get(block=engine.is_idle)
            except Empty:
                break
            if order is None:
                return
            engine.obey(order)
        done(engine.turn())
