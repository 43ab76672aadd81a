"""The loss: a weighted sum over supervised tokens. Who divides by what is the trainer's business."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def weighted_nll_sum(logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Sum over supervised tokens of weight times negative log likelihood, a float32 scalar.

    logits_NV: float, shape (N, V), the outputs that predict each supervised token; targets_N: int64; weights_N: float32.
    """
    nll_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    return (nll_N * weights_N).sum()
