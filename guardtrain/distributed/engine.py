"""DeepSpeed's configuration: one JSON file in which every value stands, and the recipe, which must not contradict each other.

The recipe owns the values in `owned_by_recipe`; files leave them out and they are filled in, or state them alike. An
`optimizer` or `scheduler` in the file would silently replace the recipe's, learning rates of modules included: it is refused.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardtrain.errors import ConfigError
from guardtrain.json_files import read_object

REFUSED = ("optimizer", "scheduler")
OFFLOADS = ("offload_param", "offload_optimizer")
COMPILING_SECONDS = 1200.0  # longer than any of DeepSpeed's operators takes
ACCELERATE_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What the recipe and the launcher say of an optimizer step.

    packs_per_step: over all ranks; world_size: ranks; dtype: float32, bfloat16 or float16.
    """

    packs_per_step: int
    world_size: int
    max_grad_norm: float
    dtype: str

    @property
    def accumulation(self) -> int:
        """Packs of one step on each rank. Raises ConfigError when they cannot be shared out evenly."""
        if self.packs_per_step % self.world_size:
            below = self.packs_per_step // self.world_size * self.world_size
            raise ConfigError(
                f"a step's packs cannot be shared out among {self.world_size} ranks",
                where="train.packs_per_step",
                expected=" or ".join(str(number) for number in (below, below + self.world_size) if number),
                found=str(self.packs_per_step),
                hint="it counts the packs of all ranks, so that a run trains alike on any number of them",
            )
        return self.packs_per_step // self.world_size


def launched_file() -> Path | None:
    """The DeepSpeed file that `accelerate launch` was told of; None where DeepSpeed is not asked for. Raises ConfigError."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    name = os.environ.get(ACCELERATE_FILE)
    if not name or name == "none":
        raise ConfigError(
            "DeepSpeed is asked for without a file",
            where="the accelerate configuration",
            expected="deepspeed_config: {deepspeed_config_file: ds_configs/….json}",
            found="single values, which would be filled up with defaults",
        )
    path = Path(name)
    # The shipped configurations name their files from the repository's root, wherever one stands.
    shipped = Path(__file__).parents[2] / path
    return shipped if not path.exists() and shipped.exists() else path


def read_file(path: Path) -> dict[str, Any]:
    """The JSON object of a DeepSpeed file. Raises ConfigError."""
    return read_object(path, "a DeepSpeed file")


def resolve(tree: dict[str, Any], shape: StepShape, *, where: str) -> dict[str, Any]:
    """`tree` with the recipe's values filled in, ready for DeepSpeed.

    Raises ConfigError that names both values where file and recipe contradict each other, for "auto", which hides what is used,
    and for an optimizer or scheduler of the file's own.
    """
    for key in REFUSED:
        if key in tree:
            raise ConfigError(f"the file brings its own {key}", where=f"{where}: {key}", expected="the recipe's", found="one")
    for key in _autos(tree):
        raise ConfigError('"auto" hides the value that is used', where=f"{where}: {key}", expected="a value, or no such key")
    resolved = copy.deepcopy(tree)
    for key, (value, owner) in owned_by_recipe(shape).items():
        *sections, last = key.split(".")
        node = resolved
        for section in sections:
            node = node.setdefault(section, {})
        if last in node and node[last] != value:
            raise ConfigError(
                "the DeepSpeed file contradicts the recipe",
                where=f"{where}: {key}",
                expected=f"{value}, from {owner}",
                found=str(node[last]),
            )
        node[last] = value
    return resolved


def owned_by_recipe(shape: StepShape) -> dict[str, tuple[Any, str]]:
    """From a DeepSpeed key to its value and where that comes from."""
    return {
        "train_micro_batch_size_per_gpu": (1, "packing: one pack is one micro-batch"),
        "gradient_accumulation_steps": (
            shape.accumulation,
            f"train.packs_per_step={shape.packs_per_step} on {shape.world_size} ranks",
        ),
        "train_batch_size": (shape.packs_per_step, "train.packs_per_step"),
        "gradient_clipping": (shape.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (shape.dtype == "bfloat16", f"model.dtype={shape.dtype}"),
        "fp16.enabled": (shape.dtype == "float16", f"model.dtype={shape.dtype}"),
    }


def zero_stage(tree: dict[str, Any]) -> int:
    """The ZeRO stage of a resolved configuration."""
    stage: int = tree.get("zero_optimization", {}).get("stage", 0)
    return stage


def offloaded_bytes(tree: dict[str, Any], trained: int, total: int, compute_bytes: int) -> int:
    """Host memory for what all ranks offload to it: float32 weights, gradients and moments, and the weights."""
    zero = tree.get("zero_optimization", {})
    optimizer = 16 * trained if zero.get("offload_optimizer", {}).get("device") == "cpu" else 0
    weights = compute_bytes * total if zero.get("offload_param", {}).get("device") == "cpu" else 0
    return optimizer + weights


def on_nvme(tree: dict[str, Any], *, what: tuple[str, ...] = OFFLOADS) -> bool:
    """Whether a resolved configuration swaps any of `what` out to NVMe: weights or optimizer states."""
    zero = tree.get("zero_optimization", {})
    return any(zero.get(key, {}).get("device") == "nvme" for key in what)


def drop_stale_locks() -> list[Path]:
    """Delete what processes that were killed while they compiled DeepSpeed's operators left: all later ones would wait for ever.

    2026-11, torch 2.13: its FileBaton asks neither who holds the lock nor since when. Returns what was deleted.
    """
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    stale = [lock for lock in root.glob("**/lock") if time.time() - lock.stat().st_mtime > COMPILING_SECONDS]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _autos(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
