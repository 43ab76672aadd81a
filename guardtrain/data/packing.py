"""Tree packing: rows that share a policy become one sequence in which the policy is computed once. Pure, no torch.

A pack is a tree of segments laid out depth first. A token attends to the tokens before it in its own segment and in the
ancestors of that segment, and its position continues from its parent's end, so every root-to-leaf path sees exactly what it
would see alone. The first token of a segment is predicted by the last token of its parent. What only waits to be predicted is
not computed: a leaf is laid out up to the token that makes its last prediction.

Shape suffixes: T tokens of the pack, S segments, N supervised tokens.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one parent in the attention tree.

    input_ids: token ids.
    weights: for each token, the weight of its prediction in the loss; 0 means not supervised.
    """

    input_ids: list[int]
    weights: list[float]
    children: tuple[Segment, ...] = ()

    @classmethod
    def unsupervised(cls, input_ids: list[int], children: Sequence[Segment] = ()) -> Segment:
        """A segment that is only read."""
        return cls(input_ids, [0.0] * len(input_ids), tuple(children))

    @classmethod
    def concatenated(cls, parts: Iterable[tuple[list[int], float]]) -> Segment:
        """One segment from runs of tokens that share a weight each."""
        input_ids: list[int] = []
        weights: list[float] = []
        for ids, weight in parts:
            input_ids += ids
            weights += [weight] * len(ids)
        return cls(input_ids, weights)

    def continued(self, branches: Sequence[Segment]) -> Segment:
        """This leaf with `branches` behind it. What all of them begin with joins its own tokens, to be computed once.

        A prediction that several branches make counts once for each of them: its weights add up. A lone branch joins whole.
        Raises ValueError when it is no leaf, or without branches.
        """
        if self.children or not branches:
            raise ValueError("only a leaf is continued, and by at least one branch")
        if len(branches) == 1:
            (branch,) = branches
            return Segment(self.input_ids + branch.input_ids, self.weights + branch.weights, branch.children)
        shared = common_beginning([branch.input_ids[:-1] for branch in branches])
        added = [sum(weights) for weights in zip(*(branch.weights[:shared] for branch in branches), strict=True)]
        rests = tuple(Segment(branch.input_ids[shared:], branch.weights[shared:], branch.children) for branch in branches)
        return Segment(self.input_ids + branches[0].input_ids[:shared], self.weights + added, rests)

    def computed_tokens(self) -> int:
        """How many of its own tokens a pack computes: a leaf ends before its last supervised token, if it has any."""
        if self.children:
            return len(self.input_ids)
        supervised = (index for index in reversed(range(len(self.weights))) if self.weights[index] > 0)
        return next(supervised, len(self.input_ids))

    def __len__(self) -> int:
        """Tokens that a pack computes of the whole subtree."""
        return self.computed_tokens() + sum(len(child) for child in self.children)


def common_beginning(runs: Sequence[Sequence[int]]) -> int:
    """How many tokens all of `runs` begin with."""
    columns = enumerate(zip(*runs, strict=False))
    return next((index for index, tokens in columns if len(set(tokens)) > 1), min(map(len, runs), default=0))


@dataclass(frozen=True)
class Pack:
    """One training sequence.

    input_ids_T, position_ids_T, segment_ids_T: int64, shape (T,).
    parents_S: int64, shape (S,); the parent of each segment, -1 for a root; a parent comes before its children.
    sources_N: index of the token whose output predicts the supervised token; targets_N: that token's id; weights_N: float32.
    index: which pack of the run it is, for messages.
    """

    input_ids_T: np.ndarray
    position_ids_T: np.ndarray
    segment_ids_T: np.ndarray
    parents_S: np.ndarray
    sources_N: np.ndarray
    targets_N: np.ndarray
    weights_N: np.ndarray
    index: int = 0

    def __len__(self) -> int:
        return len(self.input_ids_T)


@dataclass
class _Builder:
    """Lists that a depth-first walk fills."""

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segment_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, segment: Segment, parent: int, parent_last: int, position: int) -> None:
        """Append a segment and its subtree. parent_last: index of the parent's last token; position: of its first token."""
        index, start, computed = len(self.parents), len(self.input_ids), segment.computed_tokens()
        if not segment.input_ids:
            raise ValueError("a segment without tokens")
        if computed:  # a leaf of one supervised token is its parent's prediction and no segment
            self.parents.append(parent)
        self.input_ids += segment.input_ids[:computed]
        self.positions += range(position, position + computed)
        self.segment_ids += [index] * computed
        for offset, (token, weight) in enumerate(zip(segment.input_ids, segment.weights, strict=True)):
            if weight > 0:
                source = start + offset - 1 if offset else parent_last
                if source < 0:
                    raise ValueError("the first token of a root segment has nothing that predicts it")
                self.sources.append(source)
                self.targets.append(token)
                self.weights.append(weight)
        last = start + len(segment.input_ids) - 1
        for child in segment.children:
            self.add(child, index, last, position + len(segment.input_ids))


def layout(roots: Sequence[Segment]) -> Pack:
    """The pack of these trees, depth first. Every segment must hold at least one token."""
    builder = _Builder()
    for root in roots:
        builder.add(root, parent=-1, parent_last=-1, position=0)
    return Pack(
        input_ids_T=np.array(builder.input_ids, dtype=np.int64),
        position_ids_T=np.array(builder.positions, dtype=np.int64),
        segment_ids_T=np.array(builder.segment_ids, dtype=np.int64),
        parents_S=np.array(builder.parents, dtype=np.int64),
        sources_N=np.array(builder.sources, dtype=np.int64),
        targets_N=np.array(builder.targets, dtype=np.int64),
        weights_N=np.array(builder.weights, dtype=np.float32),
    )


def padded(pack: Pack, length: int) -> Pack:
    """The pack with a root segment of token 0 behind it that fills it up to `length` tokens; as it is when it is no shorter.

    Nothing looks at the padding and none of it is supervised. For backends that compile a kernel for each length.
    """
    missing = length - len(pack)
    if missing <= 0:
        return pack
    zeros = np.zeros(missing, dtype=np.int64)
    return replace(
        pack,
        input_ids_T=np.concatenate([pack.input_ids_T, zeros]),
        position_ids_T=np.concatenate([pack.position_ids_T, np.arange(missing)]),
        segment_ids_T=np.concatenate([pack.segment_ids_T, zeros + len(pack.parents_S)]),
        parents_S=np.append(pack.parents_S, -1),
    )


def plan_packs(lengths: Sequence[int], budget: int, *, num_packs_multiple: int = 1, seed: int = 0) -> list[list[int]]:
    """Assign rows to packs: best fit over rows in shuffled order, so that a pack is a random sample of rows.

    lengths: tokens of each row, the shared root not counted; budget: tokens of a pack less the shared root.
    num_packs_multiple: ranks times accumulation; packs are split until their number is a multiple, none left empty where
    there are rows enough. A row longer than the budget gets a pack of its own. Every row appears exactly once.

    2026-11, 11,037 real rows at 4,096 tokens: as full as best fit over rows in falling order (99.6 %), whose packs would hold
    rows of one length each, and with it rows of a kind (benchmarks/results/packing.json).
    """
    shuffle = random.Random(seed)
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    packs: list[list[int]] = []
    packs_with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set when some pack has room for exactly r more tokens: the best fit is one shift and one lowest bit
    for row in order:
        length = lengths[row]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = heapq.heappop(packs_with_room[room])  # of several, the one that was opened first
            if not packs_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = budget, len(packs)
            packs.append([])
        packs[pack].append(row)
        if room > length:
            heapq.heappush(packs_with_room[room - length], pack)
            rooms |= 1 << (room - length)
    _split_to_multiple(packs, num_packs_multiple)
    shuffle.shuffle(packs)
    return packs


def _split_to_multiple(packs: list[list[int]], multiple: int) -> None:
    """Halve the packs with the most rows, in place, until the number of packs is a multiple."""
    while len(packs) % multiple:
        largest = max(packs, key=len)
        if len(largest) < 2:
            raise ValueError(f"{sum(map(len, packs))} rows cannot fill a multiple of {multiple} packs")
        half = len(largest) // 2
        packs.append(largest[half:])
        del largest[half:]
