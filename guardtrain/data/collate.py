"""Packs as tensors, in the form that a transformers model takes."""

from __future__ import annotations

import numpy as np
import torch

from guardtrain.data.packing import Pack, ancestors


def collate(packs: list[Pack]) -> dict[str, torch.Tensor]:
    """The tensors of one pack (one micro-batch is one pack).

    input_ids, position_ids: int64, shape (1, T); attention_mask: bool, shape (1, 1, T, T), true where a token may look;
    sources, targets: int64, shape (N,); weights: float32, shape (N,).
    """
    (pack,) = packs
    return {
        "input_ids": torch.from_numpy(pack.input_ids_T)[None],
        "position_ids": torch.from_numpy(pack.position_ids_T)[None],
        "attention_mask": torch.from_numpy(tree_mask(pack))[None, None],
        "sources": torch.from_numpy(pack.sources_N),
        "targets": torch.from_numpy(pack.targets_N),
        "weights": torch.from_numpy(pack.weights_N),
    }


def tree_mask(pack: Pack) -> np.ndarray:
    """Bool, shape (T, T): [i, j] is true when j is not after i and j's segment is i's own or an ancestor of it."""
    segment_ids_T = pack.segment_ids_T
    is_ancestor_SS = ancestors(pack.parents_S)
    mask_TT: np.ndarray = np.tril(is_ancestor_SS[np.ix_(segment_ids_T, segment_ids_T)])
    return mask_TT
