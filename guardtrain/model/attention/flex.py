"""Backend `flex`: torch's FlexAttention under a block mask of the tree. The GPU's default; it has no backward on a CPU.

Which 128 x 128 blocks are empty, full or mixed follows from four numbers a block; only mixed ones look at single tokens.

Shape suffixes: T tokens of the pack, Q and K blocks of queries and of keys.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from guardtrain.errors import ModelError
from guardtrain.model.attention.tree import Tree, longest_path, subtree_ends

BLOCK = 128  # FlexAttention's own


def plan(tree: Tree, windows: tuple[int, ...] = ()) -> dict[str, Any]:
    """Tensors from which a device builds its block masks.

    subtree_ends, positions: int32, (T,). blocks: from a window (0: none) to the mixed and the full key blocks of each block of
    queries, as FlexAttention wants them: how many (1, 1, Q), and which (1, 1, Q, K), those first; int32.
    """
    ends_T, longest = subtree_ends(tree), longest_path(tree)
    return {
        "subtree_ends": torch.from_numpy(ends_T).int(),
        "positions": torch.from_numpy(tree.position_ids_T).int(),
        "blocks": {size: _block_lists(tree, ends_T, size) for size in (0, *windows) if size < longest},
    }


def _block_lists(tree: Tree, ends_T: np.ndarray, window: int) -> dict[str, torch.Tensor]:
    lists = {}
    for prefix, chosen_QK in zip(("", "full_"), classify_blocks(tree.position_ids_T, ends_T, window), strict=True):
        # A stable sort of "not chosen" brings the chosen ones to the front, in order.
        lists[f"{prefix}kv_num_blocks"] = torch.from_numpy(chosen_QK.sum(axis=1))[None, None].int()
        lists[f"{prefix}kv_indices"] = torch.from_numpy(np.argsort(~chosen_QK, axis=1, kind="stable"))[None, None].int()
    return lists


def classify_blocks(
    positions_T: np.ndarray, ends_T: np.ndarray, window: int, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Which key blocks a block of queries must look at token by token, and which it sees wholly: bool, (Q, K) each.

    Never wrong, only cautious: a block that is called mixed may be empty. `window`: 0 for none.
    """
    starts = np.arange(0, len(ends_T), block)
    first_Q1 = starts[:, None]
    last_Q1 = np.minimum(starts + block, len(ends_T))[:, None] - 1
    first_1K, last_1K = first_Q1.T, last_Q1.T
    farthest_1K = np.maximum.reduceat(ends_T, starts)[None, :]
    nearest_1K = np.minimum.reduceat(ends_T, starts)[None, :]
    some_QK = (first_1K <= last_Q1) & (first_Q1 < farthest_1K)
    full_QK = (last_1K <= first_Q1) & (last_Q1 < nearest_1K)
    # The last block may be short: FlexAttention would look at tokens behind its end.
    full_QK &= (last_Q1 - first_Q1 == block - 1) & (last_1K - first_1K == block - 1)
    if window:
        lowest_T, highest_T = (extreme.reduceat(positions_T, starts) for extreme in (np.minimum, np.maximum))
        some_QK &= lowest_T[:, None] - highest_T[None, :] < window
        full_QK &= highest_T[:, None] - lowest_T[None, :] < window
    return some_QK & ~full_QK, full_QK


def block_mask(plan: dict[str, Any], window: int) -> BlockMask:
    """The block mask for one window, built once a pack and kept in its plan."""
    masks: dict[int, BlockMask] = plan.setdefault("block_masks", {})
    if window not in masks:
        ends, positions = plan["subtree_ends"], plan["positions"]

        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (key <= query) & (query < ends[key])

        def sees_near(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return sees(batch, head, query, key) & (positions[query] - positions[key] < window)

        masks[window] = BlockMask.from_kv_blocks(
            **plan["blocks"][window],
            BLOCK_SIZE=BLOCK,
            mask_mod=sees_near if window else sees,
            seq_lengths=(len(ends), len(ends)),
        )
    return masks[window]


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: dict[str, Any],
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of one layer. query, key, value: (1, H, T, D), key and value with fewer heads under GQA. Returns (1, H, T, D)."""
    if dropout:
        raise ModelError("the backend has no dropout", where="flex", hint="model.attention=sdpa has it")
    size = window if window is not None and window in plan["blocks"] else 0
    function = _compiled() if query.is_cuda else flex_attention
    output: torch.Tensor = function(
        query, key, value, block_mask=block_mask(plan, size), scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output
