"""Attention over a tree pack, registered with transformers as `guardtrain_tree`.

Backend `sdpa`, the reference and the CPU default: torch's scaled_dot_product_attention, one call for each block of rows.
A block's queries can only see the shared root and the block itself, so a pack of T tokens with a root of P costs about
T * (P + block) instead of T * T; the mask inside a block is explicit.

The layout of a pack travels as an extra argument of the model's call to every layer. A call without a layout must bring its
own 4-D mask (decoding does); with neither, attention would leak between rows, and it is refused.

Shape suffixes: H query heads, T tokens of the pack, D head dimension.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from guardtrain.errors import ModelError

NAME = "guardtrain_tree"


class BlockLayout(TypedDict):
    """How a pack is cut. Tokens of the pack are the root's, then each block's, in order.

    root_tokens: length P of the segment that all rows share, 0 for a flat pack.
    block_tokens: length of each block.
    masks: for each block of n tokens, bool, shape (n, P + n): what each of its tokens may see.
    """

    root_tokens: int
    block_tokens: list[int]
    masks: list[torch.Tensor]


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: BlockLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer. query, key, value: shape (1, H, T, D), key and value with fewer heads under GQA.

    Returns (1, T, H, D) and no weights. Raises ModelError when there is neither a layout nor a 4-D mask.
    """
    if unknown := sorted(name for name in ("softcap", "s_aux") if kwargs.get(name) is not None):
        raise ModelError("the model's attention is of a kind that is not covered", where=NAME, found=", ".join(unknown))
    if layout is None:
        if attention_mask is None or attention_mask.ndim != 4:
            raise ModelError("attention without a pack layout or a 4-D mask would leak between rows", where=NAME)
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    groups = query.shape[1] // key.shape[1]
    sizes = [layout["root_tokens"], *layout["block_tokens"]]
    root_q, *block_q = torch.split(query, sizes, dim=2)
    root_k, *block_k = torch.split(repeat_kv(key, groups), sizes, dim=2)
    root_v, *block_v = torch.split(repeat_kv(value, groups), sizes, dim=2)
    outputs = []
    if layout["root_tokens"]:
        outputs.append(F.scaled_dot_product_attention(root_q, root_k, root_v, is_causal=True, dropout_p=dropout, scale=scaling))
    for q, k, v, mask in zip(block_q, block_k, block_v, layout["masks"], strict=True):
        seen_k, seen_v = torch.cat([root_k, k], dim=2), torch.cat([root_v, v], dim=2)
        outputs.append(F.scaled_dot_product_attention(q, seen_k, seen_v, attn_mask=mask, dropout_p=dropout, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def attention_window(config: Any) -> int | None:
    """The tokens that a layer with a sliding window can see, None for a model without one.

    A row no longer than the window is seen whole by such layers too, so for those tree attention is exact.
    """
    config = config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return None if kinds is not None and "sliding_attention" not in kinds else window


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout carries the masks; transformers need not build one."""
    return


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)
