"""The model on its way to disk: weights, and beside them what makes them usable: configuration, tokenizer, guard.json.

What ZeRO-3 has split among the ranks is never whole in one place: all ranks gather one tensor after the other, and the main rank
writes it.
"""

from __future__ import annotations

import collections
import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from guardtrain.data.hashes import RowHashes
from guardtrain.data.keys import example_text
from guardtrain.data.template import GuardTemplate
from guardtrain.distributed.ranks import launched, together, wait_for_main
from guardtrain.distributed.weights import Weights, is_adapter, split_streams, weights_to_save, write_model
from guardtrain.errors import CheckpointError
from guardtrain.inference.guards import GuardSettings
from guardtrain.model.load import lasting_name, quiet_progress_bars
from guardtrain.model.tensor_files import SHARD_BYTES, Shard, check_model, plan_shards, write_index, write_shard
from guardtrain.train.folder import RunFolder
from guardtrain.train.job import Job, trained_modes


def save_model(job: Job, model: Any, collapsed: str | None, at: Callable[[str], None]) -> None:
    """Write `model/` whole or not at all; every rank must call it. Raises CheckpointError.

    collapsed: what the collapse watch has to say. at: is told of each file that is begun.
    """
    unfinished = job.folder.root / "tmp-model"
    try:
        if job.zero_stage == 3 and not is_adapter(model):
            write_split_model(model, unfinished, at=at)
        else:
            weights = weights_to_save(model, job.zero_stage)
            together(lambda: wait_for_main(lambda: _write_held(model, unfinished, weights), "saved"))
        together(lambda: _complete(job, model, unfinished, collapsed) if launched().is_main else None)
    finally:
        if launched().is_main:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write_held(model: Any, folder: Path, weights: Weights | None) -> None:
    with _explained(folder), quiet_progress_bars():
        shutil.rmtree(folder, ignore_errors=True)
        write_model(model, folder, weights)


def _complete(job: Job, model: Any, folder: Path, collapsed: str | None) -> None:
    with _explained(folder):
        write_beside(job, model, folder, collapsed)
        shutil.rmtree(job.folder.model, ignore_errors=True)
        folder.rename(job.folder.model)


def write_beside(job: Job, model: Any, folder: Path, collapsed: str | None) -> None:
    """Write what belongs to weights: tokenizer, guard.json, digests of the training rows, and the configuration of a whole model.

    For the main rank alone.
    """
    if not is_adapter(model):
        # As transformers does before it writes weights, which ZeRO may have split.
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)
    if isinstance(job.template, GuardTemplate):
        _settings(job, collapsed).write(folder)
        RowHashes.of(map(example_text, job.rows.train)).write(folder)


def write_split_model(
    model: Any, folder: Path, most_bytes: int = SHARD_BYTES, at: Callable[[str], None] = lambda what: None
) -> None:
    """Write the weights of a model that ZeRO-3 has split into a new `folder`; every rank must call it. Raises CheckpointError.

    No rank ever holds more of it than one tensor. most_bytes: of one file.
    """
    shards = plan_shards(split_streams(model), most_bytes)
    together(lambda: _make_anew(folder) if launched().is_main else None)
    for shard in shards:
        at(f"saving {shard.name}")
        together(partial(_gather_into, shard, folder))
    together(lambda: _index(folder, shards) if launched().is_main else None)


def _make_anew(folder: Path) -> None:
    with _explained(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _gather_into(shard: Shard, folder: Path) -> None:
    """Every rank must call it, and reads all streams to their end, also a main rank that cannot write: the others wait for it."""
    left = iter(shard.streams)
    try:
        if launched().is_main:
            with _explained(folder, (OSError,)):
                write_shard(folder, shard, left)
    finally:
        for stream in left:
            collections.deque(stream.chunks(), maxlen=0)


def _index(folder: Path, shards: list[Shard]) -> None:
    with _explained(folder):
        write_index(folder, shards)
        check_model(folder, shards)


@contextlib.contextmanager
def _explained(folder: Path, kinds: tuple[type[Exception], ...] = (OSError, RuntimeError)) -> Iterator[None]:
    """Where `folder`, which is in the run's, cannot be written, say what is left. RuntimeError: safetensors' for a full disk."""
    run = RunFolder(folder.parent)
    try:
        yield
    except kinds as error:
        first = str(error).splitlines()[0]
        hint = f"the last checkpoint in {run.checkpoints} is intact; make room and --resume"
        raise CheckpointError("the model could not be written", where=str(run.model), found=first, hint=hint) from error


def _settings(job: Job, collapsed: str | None) -> GuardSettings:
    task = job.recipe.task
    return GuardSettings(
        base_model=lasting_name(job.recipe.model.name),
        revision=job.recipe.model.revision,
        method=job.recipe.model.method,
        policy=task.policy,
        modes=trained_modes(job.recipe, job.rows.train),
        max_reason_tokens=task.max_reason_tokens,
        max_prompt_tokens=job.recipe.data.max_prompt_tokens,
        collapsed=collapsed,
    )
