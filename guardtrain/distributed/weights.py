"""Weights on their way to disk: whole again where ZeRO-3 has shared them out, and read back once they are written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from guardtrain.distributed.ranks import launched, together
from guardtrain.errors import CheckpointError
from guardtrain.streams import CHUNK_BYTES, TensorStream

Weights = dict[str, torch.Tensor]

SHARD_SIZE = "5GB"  # transformers' own is 50 GB, and it copies a whole shard into the host's memory


def is_adapter(model: Any) -> bool:
    """Whether a model is an adapter on weights that do not train."""
    return hasattr(model, "peft_config")


def weights_to_save(model: Any, zero_stage: int) -> Weights | None:
    """What `write_model` takes; every rank must call it. None where the model holds its own weights."""
    return _gathered_adapter(model) if zero_stage == 3 else None


def write_model(model: Any, folder: Path, weights: Weights | None) -> None:
    """Write the weights, or the adapter's, and read them back. For the main rank alone. Raises CheckpointError.

    weights: of an adapter that ZeRO-3 has split. A whole model that it has split is not gathered: see `split_streams`.
    """
    # A copy: 2026-11, transformers 5.23 takes out of it what it has written, unless the model was loaded by `from_pretrained`.
    copied = None if weights is None else dict(weights)
    model.save_pretrained(folder, state_dict=copied, max_shard_size=SHARD_SIZE)
    if is_adapter(model):
        from peft import get_peft_model_state_dict

        verify(folder, get_peft_model_state_dict(model, state_dict=weights), compare_values=True)
    else:
        verify(folder, model.state_dict(), compare_values=False)


def save_adapter(model: Any, folder: Path, zero_stage: int) -> None:
    """Write an adapter beside a checkpoint of the engine, ready for use; every rank must call it. Raises CheckpointError."""
    weights = weights_to_save(model, zero_stage)
    together(lambda: write_model(model, folder, weights) if launched().is_main else None)


def verify(folder: Path, expected: Weights, *, compare_values: bool) -> None:
    """Raise CheckpointError unless the safetensors files in `folder` hold every expected tensor.

    Others have saved adapters of ZeRO-3 empty: what was shared out has no elements on any rank. compare_values: read the numbers
    too, for adapters, which are small; of a whole model the shapes are compared.
    """
    found: dict[str, tuple[list[int] | None, torch.Tensor | None]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118, it is no dict
                shape = list(saved.get_slice(name).get_shape())
                found[name] = (shape, saved.get_tensor(name) if compare_values else None)
    if not expected:
        raise CheckpointError("the model has no weights to save", where=str(folder))
    written = {expected[name].data_ptr() for name in found if name in expected}
    for name, value in expected.items():
        if name not in found and value.data_ptr() in written:
            continue  # tied to one that is there
        saved_shape, saved_value = found.get(name, (None, None))
        if saved_shape != list(value.shape) or 0 in value.shape:
            wanted = str(list(value.shape))
            raise CheckpointError("a weight was not saved", where=f"{folder}: {name}", expected=wanted, found=str(saved_shape))
        if saved_value is not None and not torch.equal(saved_value, value.detach().cpu()):
            raise CheckpointError("a weight was saved with other values", where=f"{folder}: {name}")


def split_streams(model: Any) -> list[TensorStream]:
    """The tensors of a model that ZeRO-3 has split, tied ones once, under the model's own names.

    Every rank must read the chunks of all in the same order: a tensor is gathered while its stream is read, and is split again
    when that has ended. The main rank alone gets numbers. Beside what it had, a rank holds one whole tensor and the parts of it
    that come in.
    """
    first: dict[int, TensorStream] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        shape = tuple(getattr(value, "ds_shape", value.shape))
        first.setdefault(id(value), TensorStream(name, shape, value.dtype, partial(_gathered_chunks, value)))
    return list(first.values())


def _gathered_chunks(value: torch.Tensor) -> Iterator[torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
        if launched().is_main:
            yield from torch.split(value.detach().reshape(-1), CHUNK_BYTES // value.element_size())


def _gathered_adapter(model: Any) -> Weights:
    """The weights of an adapter that ZeRO-3 has split, on the main rank's host; every rank must call it. Empty on the others."""
    import deepspeed

    gathered: Weights = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if value.requires_grad:
            with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
                if launched().is_main:
                    gathered[name] = value.detach().to("cpu", copy=True)
    return gathered
