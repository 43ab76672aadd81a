"""Checkpoints that ZeRO has split among some number of ranks, made fit for any number, through DeepSpeed's universal format."""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from guardtrain.errors import CheckpointError

# Of the Trainer's own files; those of random numbers belong to ranks that are no more.
KEPT = ("trainer_state.json", "scheduler.pt")


def convert(checkpoint: Path, target: Path) -> Path:
    """Write `checkpoint` into the folder `target` in a form that any number of ranks can load. For the main rank alone.

    The checkpoint stays as it is. Returns `target`. Raises CheckpointError.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed while it converted
    said = io.StringIO()
    try:
        step = (checkpoint / "latest").read_text(encoding="utf-8").strip()
        target.mkdir(parents=True)
        for name in KEPT:
            shutil.copy2(checkpoint / name, target)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(
                Namespace(
                    input_folder=str(checkpoint / step),
                    output_folder=str(target / step),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
    except (OSError, RuntimeError, AssertionError, LookupError, ValueError) as error:
        shutil.rmtree(target, ignore_errors=True)
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError("it cannot be converted for another number of ranks", where=str(checkpoint), found=found) from error
    return target


def loading_universal(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration whose engine loads what `convert` wrote."""
    return {**deepspeed, "checkpoint": {**deepspeed.get("checkpoint", {}), "load_universal": True}}


def mend_loaded(optimizer: Any, universal: Path) -> None:
    """Put right what DeepSpeed's loading of `universal` mixes up in the optimizer inside of its own, on this rank.

    2026-11, DeepSpeed 0.19: step counters come to lie on the host, where a fused optimizer of a GPU cannot read them. ZeRO-3
    shares one counter among all sub-groups, so that each counts the steps of all, and gives the first group's learning rate and
    weight decay to every group.
    """
    step = (universal / "latest_universal").read_text(encoding="utf-8")
    # Mapped, not read: beside the groups it holds all that the first rank had.
    saved = torch.load(universal / step / "zero" / "optimizer_state.pt", map_location="cpu", mmap=True, weights_only=False)
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):  # a plain number in DeepSpeed's own optimizers
            state["step"] = state["step"].to(parameter.device if is_fused else "cpu", copy=True)
