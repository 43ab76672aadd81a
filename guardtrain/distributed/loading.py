"""What a rank holds of weights that ZeRO-3 has shared out, and how it is filled without anybody holding a weight whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from guardtrain.distributed.ranks import any_rank


class Stored(Protocol):
    """A weight on disk, of which any part can be read."""

    def read_into(self, target_N: torch.Tensor, start: int) -> None:
        """Fill `target_N` with elements `start` to `start + N` of the flattened weight."""


def fill(model: Any, weights: Mapping[str, Stored]) -> None:
    """Read this rank's share of every weight of the model that is stored, and buffers whole. No collectives.

    All ranks together read each weight once, side by side and straight from disk; nothing passes between them.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if name in weights:
            for part_N, start in shares(value):
                weights[name].read_into(part_N, start)


def shares(value: Any) -> list[tuple[torch.Tensor, int]]:
    """What this rank holds of a weight: flat parts without their padding, and at which element of the weight each begins.

    With hpZ there are two, the rank's share among all and the one among its node. A buffer is whole on every rank.
    """
    if not hasattr(value, "ds_id"):
        return [(value.detach().view(-1), 0)]
    parts = [(value.ds_tensor, value.ds_process_group)]
    if value.ds_secondary_tensor is not None:
        parts.append((value.ds_secondary_tensor, value.ds_zero_param_process_group))
    return [_without_padding(part_N, dist.get_rank(group), value.ds_numel) for part_N, group in parts]


def _without_padding(part_N: torch.Tensor, rank: int, total: int) -> tuple[torch.Tensor, int]:
    start = rank * part_N.numel()
    return part_N[: max(0, total - start)], start


def hold_the_same(one: Any, other: Any) -> bool:
    """Whether two weights are equal on all ranks; every rank must call it."""
    pairs = zip(shares(one), shares(other), strict=True)
    return not any_rank(any(not torch.equal(a_N, b_N) for (a_N, _), (b_N, _) in pairs))
