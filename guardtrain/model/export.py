"""A folder that a model is exported into: written aside with a journal of what is done, and named when it is complete.

Where an export was killed, the next one of the same source keeps the files whose hashes still hold. The journal stays in the
folder, as the record of what it is made of, by which a folder is known as an export's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from guardtrain.errors import CheckpointError, ConfigError
from guardtrain.model.tensor_files import Shard, Written, check_model, hash_file, write_index, write_shard
from guardtrain.streams import TensorStream

JOURNAL = "export.json"
PARTIAL = "tmp-"
SPARE_BYTES = 2**20  # for headers, index and journal

Files = dict[str, Written]


@dataclass(frozen=True)
class Plan:
    """What an export consists of.

    shards: the files of weights; texts: from the name of every other file to what stands in it; fingerprint: tells one source,
    and one way to export it, from another. check: reads what was written as its users will, and raises where it is not whole.
    """

    shards: Sequence[Shard]
    texts: dict[str, bytes]
    fingerprint: str
    check: Callable[[Path, Sequence[Shard]], None] = check_model

    @property
    def num_bytes(self) -> int:
        """Of all numbers."""
        return sum(shard.num_bytes for shard in self.shards)


@dataclass(frozen=True)
class Journal:
    """What stands in JOURNAL: the fingerprint of the plan, and the files of weights that are done."""

    fingerprint: str
    files: Files

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal in `folder`; None where there is nothing. Raises ConfigError where other things are."""
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        try:
            tree = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            return cls(str(tree["fingerprint"]), {name: Written(**entry) for name, entry in tree["files"].items()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            expected = f"no such folder, an empty one, or an export's, with {JOURNAL}"
            raise ConfigError("something else lies here", where=str(folder), expected=expected) from error

    def write(self, folder: Path) -> None:
        """On disk when it returns: what stands in it is done."""
        _write_text(folder / JOURNAL, (json.dumps(asdict(self), indent=1) + "\n").encode())

    def whole_files(self, folder: Path) -> Files:
        """Those that are as they were written."""
        files = {name: folder / name for name in self.files if (folder / name).is_file()}
        return {name: self.files[name] for name, path in files.items() if hash_file(path) == self.files[name]}


def write_export(out: Path, plan: Plan, on_bytes: Callable[[int], None]) -> tuple[Files, list[str]]:
    """Write an export into `out`. Returns its files of weights, and which of them were there already, and are whole.

    on_bytes: is told of numbers that are written, or need not be. Raises ConfigError, with nothing touched, where other things or
    another export lie there; CheckpointError where there is no room, or a file does not read as it was written.
    """
    unfinished = out.with_name(f"{PARTIAL}{out.name}")
    finished, begun = Journal.read(out), Journal.read(unfinished)
    if finished is not None and finished.fingerprint != plan.fingerprint:
        raise ConfigError("another export lies here", where=str(out), hint="choose another --out, or delete it")
    try:
        if finished is not None:
            if len(finished.whole_files(out)) == len(plan.shards):
                return finished.files, list(finished.files)
            shutil.rmtree(unfinished, ignore_errors=True)
            out.rename(unfinished)
        elif begun is not None and begun.fingerprint != plan.fingerprint:
            shutil.rmtree(unfinished)
        return _fill(unfinished, out, plan, on_bytes)
    except OSError as error:
        found = error.strerror or str(error)
        hint = "files that are whole are kept: make room and export again"
        raise CheckpointError("the export could not be written", where=str(out), found=found, hint=hint) from error


def _fill(unfinished: Path, out: Path, plan: Plan, on_bytes: Callable[[int], None]) -> tuple[Files, list[str]]:
    unfinished.mkdir(parents=True, exist_ok=True)
    begun = Journal.read(unfinished)
    files = begun.whole_files(unfinished) if begun else {}
    kept = [shard for shard in plan.shards if shard.name in files]
    on_bytes(sum(shard.num_bytes for shard in kept))
    _check_room(unfinished, plan.num_bytes - sum(shard.num_bytes for shard in kept))
    for shard in plan.shards:
        Journal(plan.fingerprint, files).write(unfinished)
        if shard not in kept:
            files[shard.name] = write_shard(unfinished, shard, (_counted(stream, on_bytes) for stream in shard.streams))
    for name, text in plan.texts.items():
        if not (unfinished / name).exists():  # thresholds that were chosen since are not lost
            _write_text(unfinished / name, text)
    write_index(unfinished, plan.shards)
    plan.check(unfinished, plan.shards)
    files = {shard.name: files[shard.name] for shard in plan.shards}
    Journal(plan.fingerprint, files).write(unfinished)
    if out.is_dir():  # an empty one
        out.rmdir()
    unfinished.rename(out)
    return files, [shard.name for shard in kept]


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        expected, found = f"{num_bytes / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
        raise CheckpointError("the disk is too small", where=str(folder.parent), expected=expected, found=found)


def _counted(stream: TensorStream, on_bytes: Callable[[int], None]) -> TensorStream:
    def chunks() -> Iterator[torch.Tensor]:
        for chunk in stream.chunks():
            yield chunk
            on_bytes(chunk.nbytes)

    return replace(stream, chunks=chunks)


def _write_text(path: Path, text: bytes) -> None:
    """Whole or not at all, and on disk when it returns."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
