"""Checkpoints that can be trusted: written aside, described by a manifest, named only when whole, verified before they are used.

A folder is a checkpoint when it is called `checkpoint-STEP` and holds a manifest whose files are there with their sizes and
hashes. While it is written it is called `tmp-…`, so a kill at any moment leaves a folder that nobody takes for one. Hashing
is shared out among the ranks: each reads every n-th file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from guardtrain.distributed.ranks import gather, launched
from guardtrain.errors import CheckpointError

Listed = TypeVar("Listed")

MANIFEST = "manifest.json"
FORMAT = 1
PARTIAL = "tmp-"
DAMAGED = "damaged-"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is and what it consists of.

    step: optimizer steps done; world_size: of the ranks that wrote it; zero_stage: how it is split among them, 0 for whole;
    cursor: how to go on with the data (packs seen, seed, fingerprint); files: from each path below the folder to its bytes and
    BLAKE2b hash.
    """

    step: int
    world_size: int
    zero_stage: int
    cursor: dict[str, Any]
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that is not used, and why."""

    folder: Path
    problem: str


def step_of(folder: Path) -> int:
    """The step in the folder's name, -1 for any other name."""
    prefix, _, number = folder.name.rpartition("-")
    return int(number) if prefix == "checkpoint" and number.isdigit() else -1


def checkpoints(root: Path) -> list[Path]:
    """All folders under `root` that are called checkpoints, oldest first, whatever is in them."""
    return sorted((path for path in root.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def seal(folder: Path, root: Path, *, step: int, world_size: int, zero_stage: int, cursor: dict[str, Any]) -> Path:
    """Describe what all ranks have written into `folder` and move it to its name under `root`, on the same disk.

    Every rank must call it, after its last write. Returns the checkpoint. An older one of this step is replaced.
    """
    gather(None)  # the last write of the slowest rank
    # On a network disk a node may not list yet what another one has written, so every rank tells what it sees.
    names = sorted(set().union(*gather(_files(folder))))
    files: dict[str, tuple[int, str]] = {}
    for part in gather(_hashes(folder, _own_share(names))):
        files |= part
    target = root / f"checkpoint-{step}"
    if launched().is_main:
        manifest = Manifest(
            step=step, world_size=world_size, zero_stage=zero_stage, cursor=cursor, files=dict(sorted(files.items()))
        )
        _write_durably(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
        _sync(folder)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
        _sync(target.parent)
    gather(None)
    return target


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise CheckpointError("another version wrote it", where=str(path), expected=str(FORMAT), found=str(tree["format"]))
        files = {name: (int(size), str(digest)) for name, (size, digest) in tree["files"].items()}
        return Manifest(**{**tree, "files": files})
    except FileNotFoundError as error:
        raise CheckpointError("it was never finished", where=str(folder), expected=MANIFEST, found="none") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the manifest cannot be read", where=str(path), found=str(error)) from error


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, None when it can; every rank must call it, and all get the same answer."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        mine: str | None = str(error)
    else:
        try:
            mine = _first_damage(folder, manifest, _own_share(sorted(manifest.files)))
        except OSError as error:
            mine = f"{error.filename}: {error.strerror}"
    return next((problem for problem in gather(mine) if problem is not None), None)


def newest_valid(root: Path) -> tuple[Path | None, list[Skipped]]:
    """The newest checkpoint that can be trusted, and the newer ones that cannot; every rank must call it."""
    skipped: list[Skipped] = []
    for folder in reversed(_seen_by_main(checkpoints(root))):
        problem = problem_of(folder)
        if problem is None:
            return folder, skipped
        skipped.append(Skipped(folder, problem))
    return None, skipped


def prune(root: Path, keep: int, spare: Path | None = None) -> None:
    """Delete all but the newest `keep` finished checkpoints, and what was never finished. For the main rank alone.

    spare: one that stays for now, because it is being copied.
    """
    finished = [folder for folder in checkpoints(root) if (folder / MANIFEST).is_file()]
    old = [folder for folder in checkpoints(root) if folder not in finished[-keep:]]
    for folder in [*old, *root.glob(f"{PARTIAL}*")]:
        if folder != spare:
            shutil.rmtree(folder, ignore_errors=True)


def set_aside_after(root: Path, step: int) -> None:
    """Rename what claims to be newer than the checkpoint that is resumed: it is damaged, and would outlive the next good ones."""
    for folder in checkpoints(root):
        if step_of(folder) > step:
            damaged = folder.with_name(f"{DAMAGED}{folder.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)


def _first_damage(folder: Path, manifest: Manifest, names: list[str]) -> str | None:
    """The first of these files that is not as the manifest says. Sizes of all come first: they are cheap."""
    for name in names:
        size, _ = manifest.files[name]
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    for name in names:
        if _hash(folder / name) != manifest.files[name][1]:
            return f"{name} was changed: its hash differs"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _seen_by_main(listing: list[Listed]) -> list[Listed]:
    """The main rank's listing of a shared folder: those of other nodes may lag behind, and every rank must go the same way."""
    seen: list[Listed] = gather(listing)[0]
    return seen


def _own_share(names: list[str]) -> list[str]:
    ranks = launched()
    return names[ranks.index :: ranks.size]


def _hashes(folder: Path, names: list[str]) -> dict[str, tuple[int, str]]:
    """Size and hash of each file, which is on disk and not in a cache only once this returns."""
    return {name: ((folder / name).stat().st_size, _hash(folder / name, sync=True)) for name in names}


def _hash(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, _blake2b).hexdigest()


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=20)


def _write_durably(path: Path, text: str) -> None:
    """On disk when it returns, not in a cache: a manifest must not outlive the files that it vouches for."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
