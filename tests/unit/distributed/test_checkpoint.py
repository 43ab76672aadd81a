"""Damage of every kind is seen, named, and gone around."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from guardtrain.distributed.checkpoint import (
    MANIFEST,
    checkpoints,
    newest_valid,
    problem_of,
    prune,
    read_manifest,
    seal,
    set_aside_after,
)
from guardtrain.errors import CheckpointError


def write(root: Path, step: int) -> Path:
    """A checkpoint of three files, one of them in a folder of its own."""
    folder = root / f"tmp-{step}"
    (folder / "global").mkdir(parents=True)
    for name in ("model.safetensors", "rng_state_0.pth", "global/rank_0.pt"):
        (folder / name).write_bytes(random.Random(f"{step}{name}").randbytes(5000))
    return seal(folder, root, step=step, world_size=1, zero_stage=0, cursor={"packs": step * 4, "seed": 17})


def flip_a_byte(folder: Path) -> None:
    path = folder / "global" / "rank_0.pt"
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)


def lose_a_rank_file(folder: Path) -> None:
    (folder / "global" / "rank_0.pt").unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:777])


def never_finish(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def break_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "step"')


def come_from_the_future(folder: Path) -> None:
    tree = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**tree, "format": 2}))


DAMAGE = {
    flip_a_byte: "global/rank_0.pt was changed: its hash differs",
    lose_a_rank_file: "global/rank_0.pt is missing",
    cut_off: "model.safetensors has 777 bytes, expected 5000",
    never_finish: "it was never finished, expected manifest.json, found none",
    break_the_manifest: "the manifest cannot be read",
    come_from_the_future: "another version wrote it, expected 1, found 2",
}


def test_what_is_whole_is_trusted(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (9, 10, 100)]
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert all(problem_of(folder) is None for folder in folders)
    assert newest_valid(tmp_path) == (folders[-1], [])
    manifest = read_manifest(folders[-1])
    assert (manifest.step, manifest.world_size, manifest.cursor) == (100, 1, {"packs": 400, "seed": 17})
    assert set(manifest.files) == {"model.safetensors", "rng_state_0.pth", "global/rank_0.pt"}
    assert not list(tmp_path.glob("tmp-*"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_and_the_one_before_is_used(damage: object, tmp_path: Path) -> None:
    older, newer = write(tmp_path, 20), write(tmp_path, 30)
    damage(newer)  # type: ignore[operator]
    chosen, (skipped,) = newest_valid(tmp_path)
    assert chosen == older
    assert skipped.folder == newer
    assert DAMAGE[damage] in skipped.problem  # type: ignore[index]


def test_nothing_but_damage(tmp_path: Path) -> None:
    flip_a_byte(write(tmp_path, 20))
    cut_off(write(tmp_path, 30))
    chosen, skipped = newest_valid(tmp_path)
    assert chosen is None
    assert [folder.folder.name for folder in skipped] == ["checkpoint-30", "checkpoint-20"]


def test_a_step_that_is_written_again_replaces_the_older_one(tmp_path: Path) -> None:
    flip_a_byte(write(tmp_path, 20))
    assert problem_of(write(tmp_path, 20)) is None


def test_pruning_keeps_the_newest_and_clears_what_was_never_finished(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    (tmp_path / "tmp-20").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15", "checkpoint-notes"]


def test_damaged_ones_do_not_push_good_ones_out(tmp_path: Path) -> None:
    """Resumed at step 10 because 20 and 30 were damaged, a run that saves at 12 has 10 and 12, whatever lies beside them."""
    for step in (10, 20, 30):
        write(tmp_path, step)
    for step in (20, 30):
        (tmp_path / f"checkpoint-{step}" / "manifest.json").unlink()
    set_aside_after(tmp_path, 10)
    write(tmp_path, 12)
    prune(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-12"]
    assert sorted(path.name for path in tmp_path.glob("damaged-*")) == ["damaged-checkpoint-20", "damaged-checkpoint-30"]


def test_unfinished_ones_do_not_count_when_pruning(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    (tmp_path / "checkpoint-30" / "manifest.json").unlink()
    prune(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"]


def test_a_manifest_that_is_missing_is_an_error_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: it was never finished"):
        read_manifest(tmp_path)
