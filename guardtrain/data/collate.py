"""Packs as tensors, in the form that a model with tree attention takes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from guardtrain.data.packing import Pack, ancestors, row_starts

# Rows are gathered into blocks of about this many tokens for attention: smaller ones waste calls, larger ones compute
# scores that the mask throws away. 2026-11: 128 was fastest of 128, 256, 512 and 4,096 on two CPU cores, float32 and bfloat16.
BLOCK_TOKENS = 128


def collate(packs: list[Pack]) -> dict[str, Any]:
    """The tensors of one pack (one micro-batch is one pack).

    input_ids, position_ids: int64, shape (1, T). layout: see `guardtrain.model.attention.BlockLayout`.
    sources, targets: int64, shape (N,); weights: float32, shape (N,).
    """
    (pack,) = packs
    return {
        "input_ids": torch.from_numpy(pack.input_ids_T)[None],
        "position_ids": torch.from_numpy(pack.position_ids_T)[None],
        "layout": block_layout(pack),
        "sources": torch.from_numpy(pack.sources_N),
        "targets": torch.from_numpy(pack.targets_N),
        "weights": torch.from_numpy(pack.weights_N),
    }


def block_layout(pack: Pack, block_tokens: int = BLOCK_TOKENS) -> dict[str, Any]:
    """Cut the pack behind its root into blocks of whole rows, each closed when it holds `block_tokens` or more."""
    starts = row_starts(pack)
    root = starts[0]
    cuts = [root]
    for start in [*starts[1:], len(pack)]:
        if start - cuts[-1] >= block_tokens or start == len(pack):
            cuts.append(start)
    visible_TT = tree_mask(pack)
    masks = []
    for start, end in itertools.pairwise(cuts):
        own = visible_TT[start:end]
        masks.append(torch.from_numpy(np.concatenate([own[:, :root], own[:, start:end]], axis=1)))
    return {"root_tokens": root, "block_tokens": [len(mask) for mask in masks], "masks": masks}


def tree_mask(pack: Pack) -> np.ndarray:
    """Bool, shape (T, T): [i, j] is true when j is not after i and j's segment is i's own or an ancestor of it."""
    segment_ids_T = pack.segment_ids_T
    is_ancestor_SS = ancestors(pack.parents_S)
    mask_TT: np.ndarray = np.tril(is_ancestor_SS[np.ix_(segment_ids_T, segment_ids_T)])
    return mask_TT
