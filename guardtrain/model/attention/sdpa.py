"""Backend `sdpa`: torch's scaled_dot_product_attention under explicit masks. The reference, and the CPU's default.

One call for each block of whole rows. A block's queries can only see the shared root and the block itself, so a pack of T
tokens with a root of P costs about T * (P + block) instead of T * T.

Shape suffixes: H heads, T tokens of the pack, D head dimension.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import repeat_kv

from guardtrain.model.attention.tree import Tree, bounds, longest_path, visible

# Rows are gathered into blocks of about this many tokens: larger ones compute scores that the mask throws away, smaller ones gain
# nothing. 2026-11: 128 was fastest of 128, 256, 512 and 4,096 on two CPU cores, float32 and bfloat16.
BLOCK_TOKENS = 128


def plan(tree: Tree, windows: tuple[int, ...] = (), *, block_tokens: int = BLOCK_TOKENS) -> dict[str, Any]:
    """How the pack is cut. Its tokens are the root's, then each block's, in order.

    root_tokens: length P of the segment that all rows share, 0 for a flat pack.
    block_tokens: length of each block.
    masks: from a window (0: none) to one mask for each block of n tokens: bool, shape (n, P + n), what each of its tokens may
        see; None where that is everything before it. For a window, the root's own mask, (P, P), comes first.
    """
    starts = row_starts(tree)
    root = starts[0]
    cuts = [root]
    for start in [*starts[1:], len(tree.segment_ids_T)]:
        if start - cuts[-1] >= block_tokens or start == len(tree.segment_ids_T):
            cuts.append(start)
    blocks = [np.arange(start, end) for start, end in itertools.pairwise(cuts)]
    longest = longest_path(tree)
    return {
        "root_tokens": root,
        "block_tokens": [len(block) for block in blocks],
        "masks": {size: _masks(tree, root, blocks, size) for size in (0, *windows) if size < longest},
    }


def row_starts(tree: Tree) -> list[int]:
    """Index of the first token of each row: of the children of a lone root, or of the roots themselves in a flat pack."""
    roots = np.flatnonzero(tree.parents_S < 0)
    rows = np.flatnonzero(tree.parents_S == 0) if len(roots) == 1 else roots
    if not len(rows):  # a lone segment is a flat pack of one row
        rows = roots
    starts: list[int] = bounds(tree).starts_S[rows].tolist()
    return starts


def _masks(tree: Tree, root: int, blocks: list[np.ndarray], window: int) -> list[torch.Tensor | None]:
    root_tokens = np.arange(root)
    masks = [visible(tree, block, np.concatenate([root_tokens, block]), window) for block in blocks]
    if window:
        masks.insert(0, visible(tree, root_tokens, root_tokens, window))
    return [None if root == 0 and _is_causal(mask) else torch.from_numpy(mask) for mask in masks]


def _is_causal(mask: np.ndarray) -> bool:
    return bool(np.array_equal(mask, np.tri(len(mask), dtype=bool)))


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
    groups = query.shape[1] // key.shape[1]
    sizes = [plan["root_tokens"], *plan["block_tokens"]]
    root_q, *block_q = torch.split(query, sizes, dim=2)
    root_k, *block_k = torch.split(repeat_kv(key, groups), sizes, dim=2)
    root_v, *block_v = torch.split(repeat_kv(value, groups), sizes, dim=2)
    is_windowed = window is not None and window in plan["masks"]
    root_mask, *masks = plan["masks"][window] if is_windowed else [None, *plan["masks"][0]]

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling)

    outputs = [attended(root_q, root_k, root_v, root_mask)] if plan["root_tokens"] else []
    for q, k, v, mask in zip(block_q, block_k, block_v, masks, strict=True):
        outputs.append(attended(q, torch.cat([root_k, k], dim=2), torch.cat([root_v, v], dim=2), mask))
    return torch.cat(outputs, dim=2)
