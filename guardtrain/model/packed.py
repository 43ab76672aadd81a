"""Linear layers for inference on a processor, whose weights MKL holds in its own layout.

MKL brings a weight into that layout anew for each product, which for few rows takes as long as the product; packed once, it need
not. 2026-11, two cores, the products of SmolLM2-135M's layers, the fastest of 15: 34 rows in 46 ms, where slices of columns, the
best that can be had without packing, took 54; 300 rows in 254 ms and 312. Only a layout is bound at packing: any number of rows
may follow. A packed weight asks for 8 MB more than it holds, which are never touched and so cost an address only.

The operators are those that torch's own compiler packs weights with; they have no public name.
"""

from __future__ import annotations

from typing import Any

import torch

ROWS = 300  # that weights are packed for; fewer and more are hardly slower


class PackedLinear(torch.nn.Module):
    """What `torch.nn.Linear` computes, to its last bits, of one layer or of several that read the same rows, side by side.

    layers: in float32, on a processor, with and without biases, but not both.
    """

    def __init__(self, *layers: torch.nn.Linear) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.outputs, self.inputs = weight.shape
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self.register_buffer("packed", torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS))
        # Stands for the weight itself, which would be read for a number of rows that it is not packed for.
        self._shape = torch.empty(1).expand(weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (…, inputs); returns (…, outputs)."""
        rows = x.numel() // self.inputs
        if not rows:
            return x.new_empty(*x.shape[:-1], self.outputs)
        y: torch.Tensor = torch.ops.mkl._mkl_linear(x, self.packed, self._shape, self.bias, rows)
        return y


def can_pack() -> bool:
    """Whether this build of torch has what it takes."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")  # type: ignore[no-untyped-call]


def is_float32(layer: torch.nn.Module) -> bool:
    """Whether all its weights are, and on a processor."""
    return all(weight.device.type == "cpu" and weight.dtype is torch.float32 for weight in layer.parameters(recurse=False))


def pack_linear_layers(model: Any) -> None:
    """Pack the float32 weights of linear layers on a processor, one layer after the other: no more memory.

    For a model that is no longer trained or saved. Results differ in their last bits. A head that is the embedding stays it.
    """
    if not can_pack():
        return
    embedding = model.get_input_embeddings().weight
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):  # a subclass has its own way of holding a weight
            if type(layer) is torch.nn.Linear and layer.weight is not embedding and is_float32(layer):
                setattr(parent, name, PackedLinear(layer))
