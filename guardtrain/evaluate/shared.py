"""Score rows on several ranks, with the figures of one.

Batches are formed from all rows, whatever the number of ranks, and dealt out whole: a batch gives the same bits on any rank with
as many threads, so scores and figures are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from guardtrain.distributed.ranks import Ranks, gather, together
from guardtrain.errors import GuardtrainError
from guardtrain.inference.scored import Prompt, Scored
from guardtrain.inference.scorer import Scorer, batches_by_length
from guardtrain.types import Mode


class SharedScorer:
    """A scorer that shares its batches with the other ranks; every rank must make the same calls."""

    def __init__(self, scorer: Scorer, ranks: Ranks) -> None:
        self.scorer = scorer
        self.ranks = ranks

    def score(
        self, prompts: Sequence[Prompt], modes: Collection[Mode], *, escalates: Callable[[float], bool] | None = None
    ) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt, as `Scorer.score`: this rank's own first, then those of the others.

        Raises this rank's own GuardtrainError, or another's, on all ranks.
        """
        lengths = together(lambda: self.scorer.lengths(prompts))
        batches = batches_by_length(lengths, self.scorer.pack_tokens)
        hands = deal([sum(lengths[index] for index in batch) for batch in batches], self.ranks.size)
        own: dict[int, Scored] = {}
        error: GuardtrainError | None = None
        try:
            mine = [batches[number] for number in hands[self.ranks.index]]
            for index, scored in self.scorer.score(prompts, modes, escalates=escalates, batches=mine):
                own[index] = scored
                yield index, scored
        except GuardtrainError as raised:
            error = raised
        together(lambda: _raise(error))
        for rank, rows in enumerate(gather(own)):
            if rank != self.ranks.index:
                yield from rows.items()


def deal(costs: Sequence[float], hands: int) -> list[list[int]]:
    """Indices of `costs` in `hands` of about the same sum, each in ascending order: the costliest first, to whoever has least.

    Source: Graham, Bounds on multiprocessing timing anomalies, 1969 (longest processing time first; within 4/3 of the best).
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0.0] * hands
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        least = sums.index(min(sums))
        dealt[least].append(index)
        sums[least] += costs[index]
    return [sorted(hand) for hand in dealt]


def _raise(error: GuardtrainError | None) -> None:
    if error is not None:
        raise error
