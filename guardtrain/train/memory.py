"""What to do where memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from guardtrain.config import Recipe

GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the host's memory did not suffice."""
    signs = ("DefaultCPUAllocator", "CUDA error: out of memory", "ALLOC_FAILED", "Cuda failure 'out of memory'")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def advice(recipe: Recipe, trained: int, total: int, *, ranks: int, zero_stage: int) -> Iterator[str]:
    """Which settings make the run smaller, and by how much, the gentlest first.

    trained, total: parameters. AdamW in mixed precision takes 16 bytes for each trained one: weight, gradient, two moments. A
    frozen one takes 2.
    """
    train, states = recipe.train, (16 * trained + 2 * (total - trained)) / GIB
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true keeps the activations of one layer at a time, for a third more computing"
    if (half := train.pack_tokens // 2) >= 256:
        yield f"train.pack_tokens={half} halves the activations of a pack, now of {train.pack_tokens} tokens"
    if ranks > 1 and zero_stage < 3:
        share = states / ranks
        yield f"distributed.strategy=zero3 keeps {share:.1f} of {states:.1f} GiB of weights, gradients and moments on each rank"
    if zero_stage == 3:
        yield f"distributed.strategy=zero3_offload moves {states / ranks:.1f} GiB a rank to the host"
    if recipe.model.method == "full":
        yield f"model.method=lora needs {2 * total / GIB:.1f} GiB for the weights and little else, instead of {states:.1f} GiB"
    if recipe.model.method == "lora":
        yield f"model.method=qlora holds the weights in {0.55 * total / GIB:.1f} instead of {2 * total / GIB:.1f} GiB"
