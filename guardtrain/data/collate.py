"""Packs as tensors, in the form that a model with tree attention takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from guardtrain.data.packing import Pack, padded


@dataclass(frozen=True)
class Collator:
    """Makes a batch of one pack.

    plan: what the attention backend needs to know of the pack's tree.
    pad_to: packs are filled up to a multiple of this many tokens; 1 leaves them as they are.
    """

    plan: Callable[[Pack], dict[str, Any]]
    pad_to: int = 1

    def __call__(self, packs: list[Pack]) -> dict[str, Any]:
        """The tensors of one pack (one micro-batch is one pack).

        input_ids, position_ids: int64, shape (1, T). layout: the backend's plan. num_tokens: without padding. index: the pack's.
        sources, targets: int64, shape (N,); weights: float32, shape (N,).
        """
        (pack,) = packs
        num_tokens = len(pack)
        pack = padded(pack, -(-num_tokens // self.pad_to) * self.pad_to)
        return {
            "input_ids": torch.from_numpy(pack.input_ids_T)[None],
            "position_ids": torch.from_numpy(pack.position_ids_T)[None],
            "num_tokens": num_tokens,
            "index": pack.index,
            "layout": self.plan(pack),
            "sources": torch.from_numpy(pack.sources_N),
            "targets": torch.from_numpy(pack.targets_N),
            "weights": torch.from_numpy(pack.weights_N),
        }
