"""`guardtrain export`: a run's model as a folder for everybody else, from its finished model or from any checkpoint.

Tensors stream from where they are, safetensors or the shards of ZeRO's ranks, into files, a few megabytes at a time: neither the
model nor one of its files is ever whole in memory.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from guardtrain.distributed.checkpoint import MANIFEST, Skipped
from guardtrain.errors import ConfigError
from guardtrain.model.export import write_export
from guardtrain.model.tensor_files import Written
from guardtrain.train.export_plans import KINDS, ExportOptions
from guardtrain.train.export_source import find_source

NOT_PROJECTED = "warning: a checkpoint's adapter is as it was trained; secure.method=project projects the finished one"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """What was exported. files: of weights; kept: those of them that an earlier, unfinished export left whole."""

    out: Path
    source: Path
    to: str
    files: dict[str, Written]
    num_tensors: int
    num_parameters: int
    kept: list[str]
    skipped: list[Skipped]
    notes: list[str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "out": str(self.out),
            "source": str(self.source),
            "to": self.to,
            "files": {name: {"bytes": written.num_bytes, "blake2b": written.digest} for name, written in self.files.items()},
            "bytes": sum(written.num_bytes for written in self.files.values()),
            "tensors": self.num_tensors,
            "parameters": self.num_parameters,
            "kept": self.kept,
            "skipped": [{"checkpoint": each.folder.name, "problem": each.problem} for each in self.skipped],
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
        }

    def said(self) -> str:
        """For people."""
        num_bytes = sum(written.num_bytes for written in self.files.values())
        kept = f", {len(self.kept)} of them kept from before" if self.kept else ""
        files = f"{len(self.files)} files{kept}" if len(self.files) > 1 else f"one file{kept.replace(' of them', '')}"
        return f"{self.num_tensors} tensors, {num_bytes / 1e9:.2f} GB in {files}, read back and whole: {self.out}"


def export_run(run: Path, options: ExportOptions, console: Console) -> Export:
    """Export a run. Raises ConfigError, ModelError, CheckpointError; files that are whole are kept for the next time."""
    start = time.perf_counter()
    make_plan, formats = KINDS[options.to]
    if options.dtype is not None and formats and options.dtype not in formats:
        expected = f"{' or '.join(formats)} for --to {options.to}"
        raise ConfigError("not a format of this export", where="--dtype", expected=expected, found=options.dtype)
    with console.status("looking for a model that can be trusted"):
        source = find_source(run, options.checkpoint)
    for skipped in source.skipped:
        log.warning("%s is not used: %s", skipped.folder.name, skipped.problem)
    planned = make_plan(source, options)
    notes = list(planned.notes)
    if source.recipe.secure.method == "project" and (source.folder / MANIFEST).is_file():
        notes.append(NOT_PROJECTED)
    for note in [f"exporting {source.folder}", *notes]:
        log.info("%s", note)
    out = options.out or run / "exported" / f"{options.to}-{source.folder.name}"
    plan = planned.plan
    with _bar(console) as progress:
        task = progress.add_task(f"{len(plan.shards)} files", total=plan.num_bytes)
        files, kept = write_export(out, plan, lambda count: progress.advance(task, count))
    return Export(
        out=out,
        source=source.folder,
        to=options.to,
        files=files,
        num_tensors=planned.num_tensors,
        num_parameters=planned.num_parameters,
        kept=kept,
        skipped=source.skipped,
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


__all__ = ["KINDS", "Export", "ExportOptions", "export_run"]
