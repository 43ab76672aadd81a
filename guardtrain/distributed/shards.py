"""The model inside of a checkpoint of DeepSpeed's engine, tensor by tensor, from the files of any number of ranks.

What trains is taken from the float32 weights of the optimizer, which ZeRO lays out in flat vectors (DeepSpeed's own reader, which
holds the whole model, is deepspeed/utils/zero_to_fp32.py):

- Stages 1 and 2: the tensors of a parameter group end to end, each followed by its alignment padding, cut into one part for each
  rank; the end is padded, and the last parts may come without that padding.
- Stage 3: each rank holds the n-th part of every tensor, the last one padded to the size of the others, and these parts end to
  end.

Only the description in a file is read at once; numbers are when their stream is, from the place in the file where they lie.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guardtrain.distributed.checkpoint import Manifest, read_manifest
from guardtrain.errors import CheckpointError
from guardtrain.streams import Stored, TensorStream, pieces_of, stored_stream

Pieces = dict[str, tuple[Sequence[int], list[Stored]]]  # from a name to its shape and where its numbers lie


@dataclass(frozen=True)
class _File:
    """What torch.save wrote into a file; its tensors are without their numbers."""

    path: Path
    tree: dict[str, Any]

    @classmethod
    def described(cls, path: Path) -> _File:
        """Classes of DeepSpeed are in it, so it is unpickled in full: only for checkpoints of one's own."""
        # On the meta device nothing is read: each storage remembers its place in the file (torch 2.13).
        return cls(path, torch.load(path, map_location="meta", weights_only=False))

    def stored(self, tensor: torch.Tensor) -> Stored:
        """Where the numbers of one of its tensors lie."""
        if not tensor.is_contiguous():
            raise ValueError("a tensor whose numbers do not lie one after the other")
        storage: Any = tensor.untyped_storage()
        offset = storage._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
        return Stored(self.path, offset, tensor.numel(), tensor.dtype)


def engine_streams(checkpoint: Path, dtype: torch.dtype | None = None) -> list[TensorStream]:
    """All tensors of the model in its own order; of tied ones the first. Raises CheckpointError.

    dtype: None rounds to the model's own number formats, as training does after each step.
    """
    manifest = read_manifest(checkpoint)
    if not torch.cuda.is_available():
        # 2026-11: DeepSpeed, whose classes are in the files, else warns on standard output that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
        models = [_File.described(path) for path in _model_files(folder, manifest)]
        optimizers = [_File.described(_optimizer_file(folder, rank)) for rank in range(manifest.world_size)]
        return _streams(checkpoint, manifest, models, optimizers, dtype)
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, ImportError, pickle.UnpicklingError) as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError("the engine's files cannot be read", where=str(checkpoint), found=found) from error


def _streams(
    checkpoint: Path, manifest: Manifest, models: list[_File], optimizers: list[_File], dtype: torch.dtype | None
) -> list[TensorStream]:
    first = models[0].tree
    found = _in_parts(checkpoint, models, optimizers) if manifest.zero_stage == 3 else _end_to_end(checkpoint, first, optimizers)
    streams = []
    for name, value in first["module"].items():
        if name in first["shared_params"]:
            continue
        # Whole in the first rank's file: buffers, and below stage 3 what does not train.
        shape, pieces = found.get(name) or (value.shape, [models[0].stored(value)])
        if math.prod(shape) != sum(piece.count for piece in pieces):
            raise CheckpointError("a weight is not in it", where=f"{checkpoint}: {name}")
        streams.append(stored_stream(name, shape, pieces).to(dtype or value.dtype))
    return streams


def _in_parts(checkpoint: Path, models: list[_File], optimizers: list[_File]) -> Pieces:
    """Stage 3: each rank's part of what trains, and of what does not."""
    first, found, offset = models[0].tree, Pieces(), 0
    flat = [[each.stored(group) for group in each.tree["optimizer_state_dict"]["fp32_flat_groups"]] for each in optimizers]
    for name, shape in (item for group in first["param_shapes"] for item in group.items()):
        count = math.prod(shape)
        size = math.ceil(count / len(flat))
        parts = (pieces_of(mine, offset, offset + min(size, count - rank * size)) for rank, mine in enumerate(flat))
        found[name] = (shape, [piece for part in parts for piece in part])
        offset += size
    for rank, mine in enumerate(flat):
        _check_used_up(f"{checkpoint}: rank {rank}", offset, sum(part.count for part in mine))
    for name, shape in first["frozen_param_shapes"].items():
        fragments = [model.stored(model.tree["frozen_param_fragments"][name]) for model in models]
        found[name] = (shape, pieces_of(fragments, 0, math.prod(shape)))
    return found


def _end_to_end(checkpoint: Path, model: dict[str, Any], optimizers: list[_File]) -> Pieces:
    """Stages 1 and 2: what trains, from each rank's part of each group's vector."""
    found = Pieces()
    alignment = 2 * len(optimizers)
    states = [each.tree["optimizer_state_dict"] for each in optimizers]
    paddings = states[0].get("param_alignment_paddings")
    for number, group in enumerate(model["param_shapes"]):
        parts = [state["single_partition_of_fp32_groups"][number] for state in states]
        vector = [each.stored(part) for each, part in zip(optimizers, parts, strict=True)]
        offset = 0
        for index, (name, shape) in enumerate(group.items()):
            count = math.prod(shape)
            found[name] = (shape, pieces_of(vector, offset, offset + count))
            offset += count + (paddings[number][index] if paddings else 0)
        held = sum(part.count for part in vector)
        # Some optimizers save the padding at the end, others do not.
        _check_used_up(f"{checkpoint}: group {number}", *(math.ceil(each / alignment) * alignment for each in (offset, held)))
    return found


def _check_used_up(where: str, wanted: int, held: int) -> None:
    if wanted != held:
        raise CheckpointError(
            "the optimizer's weights do not fit the model",
            where=where,
            expected=f"{wanted} numbers",
            found=str(held),
            hint="weights that were swapped out to NVMe are not in it: let the run finish, its end saves the model",
        )


def _model_files(folder: Path, manifest: Manifest) -> list[Path]:
    """One of each rank under stage 3, else the first rank's."""
    if manifest.zero_stage < 3:
        return [folder / "mp_rank_00_model_states.pt"]
    return [folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(manifest.world_size)]


def _optimizer_file(folder: Path, rank: int) -> Path:
    plain = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return plain if plain.exists() else plain.with_name(f"bf16_{plain.name}")
