"""What every backend needs to know of a pack: one description of its attention tree. Pure, numpy only.

Segments lie depth first, so a segment's subtree is one stretch of tokens. With `subtree_ends_T`, the end of that stretch for
the segment of each token, who may see whom takes two comparisons:

    token i sees token j  when  j <= i < subtree_ends_T[j]

Under a sliding window, the tokens that it sees are also fewer than `window` positions back on its path.

Shape suffixes: T tokens of the pack, S segments, Q and K the tokens that look and are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Tree(Protocol):
    """A pack's tree, as `guardtrain.data.packing.Pack` describes it: int64 arrays, parents before their children."""

    @property
    def segment_ids_T(self) -> np.ndarray:
        """The segment of each token, rising."""

    @property
    def position_ids_T(self) -> np.ndarray:
        """The position of each token on its root-to-leaf path."""

    @property
    def parents_S(self) -> np.ndarray:
        """The parent of each segment, -1 for a root."""


@dataclass(frozen=True)
class Bounds:
    """Where each segment lies: its own tokens are [starts, ends), those of its subtree [starts, subtree_ends). int64, (S,)."""

    starts_S: np.ndarray
    ends_S: np.ndarray
    subtree_ends_S: np.ndarray


def bounds(tree: Tree) -> Bounds:
    """The bounds of each segment."""
    segments = np.arange(len(tree.parents_S))
    starts_S = np.searchsorted(tree.segment_ids_T, segments, side="left")
    ends_S = np.searchsorted(tree.segment_ids_T, segments, side="right")
    subtree_ends = ends_S.tolist()
    parents = tree.parents_S.tolist()
    for segment in reversed(range(len(parents))):
        if parents[segment] >= 0:
            subtree_ends[parents[segment]] = max(subtree_ends[parents[segment]], subtree_ends[segment])
    return Bounds(starts_S, ends_S, np.array(subtree_ends, dtype=np.int64))


def subtree_ends(tree: Tree) -> np.ndarray:
    """For each token the end of its segment's subtree: the first token after it that may not see it. int64, (T,)."""
    ends_T: np.ndarray = bounds(tree).subtree_ends_S[tree.segment_ids_T]
    return ends_T


def visible(tree: Tree, queries_Q: np.ndarray, keys_K: np.ndarray, window: int = 0) -> np.ndarray:
    """Bool, (Q, K): which of these tokens see which. `queries_Q`, `keys_K`: token indices; window: 0 for none."""
    looks_Q1, seen_1K = queries_Q[:, None], keys_K[None, :]
    mask_QK: np.ndarray = (seen_1K <= looks_Q1) & (looks_Q1 < subtree_ends(tree)[keys_K][None, :])
    if window:
        mask_QK &= tree.position_ids_T[queries_Q][:, None] - tree.position_ids_T[keys_K][None, :] < window
    return mask_QK


def longest_path(tree: Tree) -> int:
    """Tokens of the longest root-to-leaf path."""
    return int(tree.position_ids_T.max()) + 1
