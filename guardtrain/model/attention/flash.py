"""Backend `flash`: the flash-attention kernels that torch brings (version 2), or flash-attn's 3 and 4 where installed.

They know sequences, not trees. So each token attends in several calls, and the parts are merged:

    own        every segment is a causal sequence of its own
    level d    all tokens below a segment of depth d look at the whole of that segment

Part i gives an output o_i and the log-sum-exp of its scores, l_i. With l the log-sum-exp over all l_i, the softmax over
everything that a token sees is o = sum_i exp(l_i - l) o_i. The kernels' backward recomputes probabilities as
exp(score - l) and needs the row sums of o * do, so each part's gradients are right when it is given the *merged* o and l, as
in ring attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889).

Shape suffixes: H heads, T tokens of the pack, Q and K tokens that look and are looked at, D head dimension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import activate_flash_attention_impl

from guardtrain.errors import ModelError
from guardtrain.model.attention.tree import Tree, bounds, longest_path

# What torch calls the newer kernels, best first, by the major compute capability that they are written for.
NEWER_KERNELS = {9: ("FA3", "FA4"), 10: ("FA4",)}
MODULES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}


def use_newest_kernels() -> str:
    """Put the newest kernels that are installed for this GPU in the place of torch's own; says which are in use now."""
    wanted = newest_kernels(torch.cuda.get_device_capability()[0], _is_installed)
    if wanted is None:
        return "torch's own kernels"
    try:
        activate_flash_attention_impl(wanted)
    except Exception as error:  # built for another torch, half installed, without a backward: whatever its import raises
        return f"torch's own kernels, {wanted} does not load: {str(error).splitlines()[0]}"
    return f"the kernels of {wanted}"


def newest_kernels(capability: int, is_installed: Callable[[str], bool]) -> str | None:
    """The best of NEWER_KERNELS for a GPU of this major compute capability, None for torch's own."""
    return next((name for name in NEWER_KERNELS.get(capability, ()) if is_installed(MODULES[name])), None)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent is missing
        return False


def plan(tree: Tree, windows: tuple[int, ...] = ()) -> dict[str, Any]:
    """The calls of one layer: those of `own`, then of each level that has children.

    Each call: queries, keys: int64, indices of its tokens, None for all of them in order; cu_queries, cu_keys: int32, where its
    sequences begin; max_queries, max_keys: their greatest lengths; is_causal.
    """
    place = bounds(tree)
    own = {
        "queries": None,
        "keys": None,
        "is_causal": True,
        **_sequences(place.ends_S - place.starts_S, place.ends_S - place.starts_S),
    }
    depth_S = _depths(tree.parents_S)
    has_children_S = place.subtree_ends_S > place.ends_S
    levels = []
    for depth in range(int(depth_S.max()) + 1):
        parents = np.flatnonzero(has_children_S & (depth_S == depth))
        if len(parents):
            above = [np.arange(place.starts_S[s], place.ends_S[s]) for s in parents]
            below = [np.arange(place.ends_S[s], place.subtree_ends_S[s]) for s in parents]
            lengths = [np.array([len(tokens) for tokens in side]) for side in (below, above)]
            indices = {"queries": torch.from_numpy(np.concatenate(below)), "keys": torch.from_numpy(np.concatenate(above))}
            levels.append({**indices, "is_causal": False, **_sequences(*lengths)})
    return {"calls": [own, *levels], "longest_path": longest_path(tree)}


def _depths(parents_S: np.ndarray) -> np.ndarray:
    depths: list[int] = []
    for parent in parents_S.tolist():
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return np.array(depths)


def _sequences(query_lengths: np.ndarray, key_lengths: np.ndarray) -> dict[str, Any]:
    return {
        "cu_queries": _cumulated(query_lengths),
        "cu_keys": _cumulated(key_lengths),
        "max_queries": int(query_lengths.max()),
        "max_keys": int(key_lengths.max()),
    }


def _cumulated(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).int()


class TorchKernel:
    """Attention of sequences that lie one after the other, and its gradient for a given output and log-sum-exp.

    These are the kernels under `torch.nn.attention.varlen`, whose own gradient knows the parts' outputs only. query: (Q, H, D);
    key, value: (K, H or fewer, D); lse: float32, (H, Q); call: see `plan`.
    """

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: dict[str, Any], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, as `query`, and lse."""
        sizes = (call["cu_queries"], call["cu_keys"], call["max_queries"], call["max_keys"])
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *sizes, 0.0, call["is_causal"], return_debug_mask=False, scale=scale
        )
        return output, lse

    def backward(
        self, grad: torch.Tensor, parts: tuple[torch.Tensor, ...], call: dict[str, Any], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query, key and value. parts: query, key, value, output, lse."""
        sizes = (call["cu_queries"], call["cu_keys"], call["max_queries"], call["max_keys"])
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad.device)
        unused = torch.empty(0, device=grad.device)
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
            grad, *parts, *sizes, 0.0, call["is_causal"], no_dropout, unused, scale=scale
        )
        return gradients


class MergedAttention(torch.autograd.Function):
    """All calls of one layer, merged. query, key, value: (T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        calls: list[dict[str, Any]],
        scale: float,
        kernel: TorchKernel,
    ) -> torch.Tensor:
        """Returns (T, H, D)."""
        own, *levels = calls
        output, lse_HT = kernel.forward(query, key, value, own, scale)
        if levels:
            merged = output.to(lse_HT.dtype)
            for call in levels:
                rows = call["queries"]
                part, part_lse_HQ = kernel.forward(query[rows], key[call["keys"]], value[call["keys"]], call, scale)
                lse_HQ = torch.logaddexp(lse_HT[:, rows], part_lse_HQ)
                old = torch.exp(lse_HT[:, rows] - lse_HQ).t()[..., None]
                new = torch.exp(part_lse_HQ - lse_HQ).t()[..., None]
                merged[rows] = old * merged[rows] + new * part
                lse_HT[:, rows] = lse_HQ
            output = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse_HT)
        ctx.calls, ctx.scale, ctx.kernel = calls, scale, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Sums over the calls, each with the merged output and log-sum-exp of its queries."""
        query, key, value, output, lse_HT = ctx.saved_tensors
        grad = grad.contiguous()
        own, *levels = ctx.calls
        gradients = ctx.kernel.backward(grad, (query, key, value, output, lse_HT), own, ctx.scale)
        if levels:
            sums = [gradient.to(lse_HT.dtype) for gradient in gradients]
            for call in levels:
                rows, seen = call["queries"], call["keys"]
                below = (query[rows], key[seen], value[seen], output[rows], lse_HT[:, rows].contiguous())
                parts = ctx.kernel.backward(grad[rows], below, call, ctx.scale)
                for total, part, tokens in zip(sums, parts, (rows, seen, seen), strict=True):
                    # A token is in one sequence of a call only, so plain indexing adds; index_add_ is not deterministic on a GPU.
                    total[tokens] += part
            gradients = tuple(total.to(query.dtype) for total in sums)
        return (*gradients, None, None, None)


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's format where it is on: it does not know these kernels, and norms leave float32 behind."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: dict[str, Any],
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    kernel: TorchKernel | None = None,
) -> torch.Tensor:
    """Attention of one layer. query, key, value: (1, H, T, D), key and value with fewer heads under GQA. Returns (1, H, T, D)."""
    if dropout:
        raise ModelError("the backend has no dropout", where="flash", hint="model.attention=sdpa has it")
    if window is not None and window < plan["longest_path"]:
        raise ModelError(
            "a row is longer than the model's sliding window", where="flash", hint="model.attention=flex has windows"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = as_autocast(query, key, value)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    output: torch.Tensor = MergedAttention.apply(q, k, v, plan["calls"], scale, kernel or TorchKernel())  # type: ignore[no-untyped-call]
    return output.transpose(0, 1)[None]
