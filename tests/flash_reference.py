"""Attention of sequences that lie one after the other, with flash-attention's interface, in a few plain lines on a CPU.

The backward is flash-attention's own algebra (Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B.2): probabilities
from the given log-sum-exp, and the row sums of output times its gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from guardtrain.model.attention.flash import TorchKernel


class ReferenceKernel(TorchKernel):
    """See `TorchKernel`."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: dict[str, Any], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = torch.empty_like(query)
        lse_HQ = query.new_empty(query.shape[1], query.shape[0])
        for rows, seen in sequences(call):
            scores = scores_of(query[rows], key[seen], call["is_causal"], scale)
            lse_HQ[:, rows] = scores.logsumexp(-1)
            output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), heads_like(value[seen], query))
        return output, lse_HQ

    def backward(
        self, grad: torch.Tensor, parts: tuple[torch.Tensor, ...], call: dict[str, Any], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, output, lse = parts
        grad_query, grad_key, grad_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
        row_sums_HQ = (grad * output).sum(-1).t()
        for rows, seen in sequences(call):
            scores = scores_of(query[rows], key[seen], call["is_causal"], scale)
            probabilities = torch.exp(scores - lse[:, rows, None])
            wanted = torch.einsum("qhd,khd->hqk", grad[rows], heads_like(value[seen], query))
            grad_scores = probabilities * (wanted - row_sums_HQ[:, rows, None]) * scale
            grad_query[rows] = torch.einsum("hqk,khd->qhd", grad_scores, heads_like(key[seen], query))
            grad_key[seen] = summed_like(torch.einsum("hqk,qhd->khd", grad_scores, query[rows]), key)
            grad_value[seen] = summed_like(torch.einsum("hqk,qhd->khd", probabilities, grad[rows]), value)
        return grad_query, grad_key, grad_value


def sequences(call: dict[str, Any]) -> Iterator[tuple[slice, slice]]:
    """The queries and keys of each sequence of a call."""
    queries, keys = (itertools.pairwise(call[name].tolist()) for name in ("cu_queries", "cu_keys"))
    for (first_query, last_query), (first_key, last_key) in zip(queries, keys, strict=True):
        assert last_query - first_query <= call["max_queries"]
        assert last_key - first_key <= call["max_keys"]
        yield slice(first_query, last_query), slice(first_key, last_key)


def scores_of(query: torch.Tensor, key: torch.Tensor, is_causal: bool, scale: float) -> torch.Tensor:
    """(H, Q, K); under a causal mask Q and K are the same tokens."""
    scores = torch.einsum("qhd,khd->hqk", query, heads_like(key, query)) * scale
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return scores


def heads_like(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Key or value heads repeated for the query heads that share them."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def summed_like(gradient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of repeated heads, summed over the query heads that share one."""
    return gradient.unflatten(1, (tensor.shape[1], -1)).sum(2)
