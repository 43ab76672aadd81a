"""What an export is made of: a run's finished model or one of its checkpoints, and the text files that make weights usable."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from guardtrain.config import Recipe
from guardtrain.distributed.checkpoint import MANIFEST, Skipped, newest_valid, problem_of, read_manifest
from guardtrain.errors import CheckpointError, ConfigError, ModelError
from guardtrain.inference.guards import GUARD_FILE, GuardSettings
from guardtrain.model.export import JOURNAL
from guardtrain.model.merge import ADAPTER_CONFIG
from guardtrain.model.tensor_files import INDEX
from guardtrain.overrides import load_recipe
from guardtrain.streams import TensorStream
from guardtrain.train.folder import RunFolder

FORMAT = 1
# Beside the weights of a model or checkpoint, text files make it usable, except those that are of the training or of the weights.
TEXTS = {".json", ".jinja", ".txt", ".model"}
NOT_BESIDE = {"trainer_state.json", MANIFEST, ADAPTER_CONFIG, INDEX, JOURNAL}


@dataclass(frozen=True)
class Source:
    """Where the weights are: the run's finished model or a checkpoint, and newer checkpoints that cannot be trusted."""

    folder: Path
    recipe: Recipe
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter and not a whole model."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def is_guard(self) -> bool:
        """Whether it was trained to judge."""
        return self.recipe.task.kind == "guard"


def find_source(root: Path, checkpoint: str | None) -> Source:
    """The source in a run folder. checkpoint: its name; None: the finished model, else the newest valid one.

    Raises ConfigError where it is no run, CheckpointError where there is nothing that can be trusted.
    """
    run = RunFolder(root)
    if not run.recipe.is_file():
        found = "a folder without it" if root.is_dir() else "no such folder"
        raise ConfigError("not a run", where=str(root), expected="a folder with recipe.yaml", found=found)
    recipe = load_recipe(str(run.recipe))
    if checkpoint is None and run.model.is_dir():
        return Source(run.model, recipe)
    if checkpoint is None:
        folder, skipped = newest_valid(run.checkpoints)
        if folder is None:
            found = "; ".join(f"{each.folder.name}: {each.problem}" for each in skipped) or "none"
            raise CheckpointError("nothing to export", where=str(run.checkpoints), expected="a whole checkpoint", found=found)
        return Source(folder, recipe, skipped)
    folder = run.checkpoints / checkpoint
    if not folder.is_dir():
        names = ", ".join(sorted(path.name for path in run.checkpoints.glob("checkpoint-*"))) or "no checkpoint"
        raise CheckpointError("no such checkpoint", where=f"--checkpoint {checkpoint}", expected=names)
    problem = problem_of(folder)
    if problem is not None:
        raise CheckpointError("the checkpoint cannot be trusted", where=str(folder), found=problem)
    return Source(folder, recipe)


def base_of(source: Source) -> tuple[str, str | None]:
    """The model argument that an adapter was trained from, and its revision."""
    if (source.folder / GUARD_FILE).is_file():
        guard = GuardSettings.read(source.folder)
        return guard.base_model, guard.revision
    return source.recipe.model.name, source.recipe.model.revision


def texts_beside(source: Source) -> dict[str, bytes]:
    """Tokenizer, configuration and guard.json. Raises CheckpointError when they are missing."""
    found = {
        path.name: path.read_bytes()
        for path in sorted(source.folder.iterdir())
        if path.is_file() and path.suffix in TEXTS and path.name not in NOT_BESIDE
    }
    needed = ["tokenizer_config.json"] + [GUARD_FILE] * source.is_guard
    for name in needed:
        if name not in found:
            hint = "an older version wrote it; --resume the run for one more save"
            raise CheckpointError(
                "what makes the weights usable is not in it", where=str(source.folder), expected=name, hint=hint
            )
    return found


def config_naming_format(source: Source, texts: Mapping[str, bytes], streams: Sequence[TensorStream]) -> bytes:
    """config.json with the format of most numbers in it: the base model's or the run's own may be another. Raises ModelError."""
    sizes: Counter[torch.dtype] = Counter()
    for stream in streams:
        sizes[stream.dtype] += stream.num_bytes
    (dtype, _), *_ = sizes.most_common(1)
    try:
        config = json.loads(texts["config.json"])
        name = str(dtype).removeprefix("torch.")
        if config.get("dtype") == name:
            return texts["config.json"]
        config.pop("torch_dtype", None)  # the older spelling
        return (json.dumps({**config, "dtype": name}, indent=2, sort_keys=True) + "\n").encode()
    except (LookupError, ValueError, AttributeError) as error:
        hint = "an older version wrote it; --resume the run for one more save"
        raise ModelError(
            "no configuration of the model can be read", where=str(source.folder), expected="config.json", hint=hint
        ) from error


def fingerprint_of(folder: Path) -> list[Any]:
    """What tells one source from another: a checkpoint's manifest, which holds all hashes; else files, sizes and times."""
    if (folder / MANIFEST).is_file():
        return [asdict(read_manifest(folder))]
    files = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files if name != JOURNAL]


def digest(value: Any) -> str:
    """Of what an export is made of, and how."""
    return hashlib.blake2b(json.dumps([FORMAT, value]).encode(), digest_size=20).hexdigest()
