"""What one forward of a model is given, made before it runs: two decoders' inputs can then go through one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Inputs:
    """ids, positions: of T new tokens, (T,). ends: the tokens whose logits are asked for. attention: as the model takes it."""

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    attention: dict[str, Any]

    def run(self, model: Any) -> torch.Tensor:
        """The logits behind `ends`, float32, shape (ends, V)."""
        kept = {"logits_to_keep": self.ends, **self.attention}
        logits: torch.Tensor = model(input_ids=self.ids[None], position_ids=self.positions[None], **kept).logits[0].float()
        return logits


def run_both(model: Any, read: Inputs, written: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in one forward of a model that `make_lean` made; weights are read once. Logits as of `Inputs.run`."""
    both = Inputs(
        torch.cat([read.ids, written.ids]),
        torch.cat([read.positions, written.positions]),
        torch.cat([read.ends, written.ends + len(read.ids)]),
        written.attention | read.attention,
    )
    logits = both.run(model)
    return logits[: len(read.ends)], logits[len(read.ends) :]
