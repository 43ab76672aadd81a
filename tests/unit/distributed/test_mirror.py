"""The second place: whole checkpoints or none, and a run that does not care when it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guardtrain.distributed.checkpoint import newest_valid, prune, seal
from guardtrain.distributed.mirror import Mirror, copy_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 to 3."""
    for step in (1, 2, 3):
        writing = tmp_path / "run" / "checkpoints" / "tmp-checkpoint" / f"checkpoint-{step}"
        writing.mkdir(parents=True)
        (writing / "optimizer.pt").write_bytes(bytes([step]) * 1000)
        seal(writing, tmp_path / "run" / "checkpoints", step=step, world_size=1, zero_stage=0, cursor={})
    (tmp_path / "run" / "recipe.yaml").write_text("name: x\n")
    return tmp_path / "run"


def test_a_mirror_is_a_run_folder_with_the_newest_checkpoints(run: Path, tmp_path: Path) -> None:
    mirror = Mirror(run, tmp_path / "mirror", keep=2)
    for step in (1, 2, 3):
        mirror.copy_later(run / "checkpoints" / f"checkpoint-{step}")
        wait_until(lambda name=f"checkpoint-{step}": (tmp_path / "mirror" / "checkpoints" / name / "manifest.json").is_file())
    (run / "model").mkdir()
    (run / "model" / "guard.json").write_text("{}")
    mirror.finish()
    names = sorted(path.name for path in (tmp_path / "mirror" / "checkpoints").iterdir())
    assert names == ["checkpoint-2", "checkpoint-3"]
    newest, skipped = newest_valid(tmp_path / "mirror" / "checkpoints")
    assert newest is not None
    assert (newest.name, skipped) == ("checkpoint-3", [])
    assert (tmp_path / "mirror" / "recipe.yaml").read_text() == "name: x\n"
    assert (tmp_path / "mirror" / "model" / "guard.json").read_text() == "{}"


def test_a_copy_that_was_cut_off_is_no_checkpoint_and_is_made_again(run: Path, tmp_path: Path) -> None:
    source, root = run / "checkpoints" / "checkpoint-3", tmp_path / "mirror" / "checkpoints"
    copied = copy_checkpoint(source, root)
    (copied / "manifest.json").unlink()  # it comes last
    (copied / "optimizer.pt").write_bytes(b"half")
    checkpoint, skipped = newest_valid(root)
    assert checkpoint is None
    assert "never finished" in skipped[0].problem
    copy_checkpoint(source, root)
    assert newest_valid(root)[0] == copied


def test_copying_again_over_a_finished_copy_is_no_checkpoint_until_it_is_done(run: Path, tmp_path: Path) -> None:
    """A step that is saved once more after a resume: the old manifest must not vouch for a mixture of both."""
    source, root = run / "checkpoints" / "checkpoint-3", tmp_path / "mirror" / "checkpoints"
    copied = copy_checkpoint(source, root)
    (source / "optimizer.pt").unlink()  # the copy is cut off in its middle
    with pytest.raises(FileNotFoundError):
        copy_checkpoint(source, root)
    assert not (copied / "manifest.json").exists()


def test_only_the_newest_waits(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that is slower than training gets every checkpoint that it can, and the last one for certain."""
    import threading

    import guardtrain.distributed.mirror as module

    gate, copied = threading.Event(), []

    def slow(folder: Path, root: Path) -> Path:
        gate.wait(10)
        copied.append(folder.name)
        return copy_checkpoint(folder, root)

    monkeypatch.setattr(module, "copy_checkpoint", slow)
    mirror = Mirror(run, tmp_path / "mirror", keep=2)
    for step in (1, 2, 3):
        mirror.copy_later(run / "checkpoints" / f"checkpoint-{step}")
        if step == 1:
            wait_until(lambda: mirror.copying is not None)  # it has been begun, so it is not dropped
    gate.set()
    mirror.finish()
    assert copied == ["checkpoint-1", "checkpoint-3"]


def test_a_place_that_hangs_holds_nobody_up(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import guardtrain.distributed.mirror as module

    monkeypatch.setattr(module, "copy_checkpoint", lambda folder, root: time.sleep(60))
    mirror = Mirror(run, tmp_path / "mirror", keep=2)
    mirror.copy_later(run / "checkpoints" / "checkpoint-3")
    start = time.monotonic()
    mirror.finish(seconds=0.3)
    assert time.monotonic() - start < 5


def test_what_is_being_copied_is_not_pruned(run: Path) -> None:
    root = run / "checkpoints"
    prune(root, keep=1, spare=root / "checkpoint-1")
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_place_that_is_gone_is_a_warning(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a-file").write_text("no folder")
    mirror = Mirror(run, tmp_path / "a-file" / "mirror", keep=2)
    with caplog.at_level(logging.WARNING):
        mirror.copy_later(run / "checkpoints" / "checkpoint-3")
        mirror.finish()
    assert [record.getMessage().split(" to ")[0] for record in caplog.records] == [
        "checkpoint-3 was not copied",
        "the model was not copied",
    ]
