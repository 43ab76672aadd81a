"""An export's folder: complete or absent, gone on with after a kill, and nobody else's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from guardtrain.errors import CheckpointError, ConfigError
from guardtrain.model import export
from guardtrain.model.export import JOURNAL, Plan, write_export
from guardtrain.model.tensor_files import plan_shards
from guardtrain.streams import TensorStream

NAMES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


class Killed(Exception):
    """In the place of a SIGKILL."""


def plan(fingerprint: str = "a", dies_at: str | None = None, factor: float = 1) -> Plan:
    """Three files of ten numbers; reading one of them may end it all."""

    def stream(number: int, name: str) -> TensorStream:
        def chunks():
            if name == dies_at:
                raise Killed
            yield torch.full((10,), float(factor * number))

        return TensorStream(name, (10,), torch.float32, chunks)

    streams = [stream(number, name) for number, name in enumerate("abc")]
    return Plan(plan_shards(streams, 40), {"config.json": b"{}"}, fingerprint)


def ignore(_: int) -> None:
    """Nobody watches."""


def test_a_whole_export_and_nothing_beside_it(tmp_path: Path) -> None:
    told: list[int] = []
    files, kept = write_export(tmp_path / "deep" / "out", plan(), told.append)
    assert list(files) == NAMES
    assert kept == []
    assert sum(told) == 120
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == sorted(
        [*NAMES, "model.safetensors.index.json", "config.json", JOURNAL]
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert write_export(tmp_path / "deep" / "out", plan(dies_at="a"), ignore) == (files, NAMES), "nothing is read again"


def kill_at_the_third(out: Path, fingerprint: str = "a") -> Path:
    with pytest.raises(Killed):
        write_export(out, plan(fingerprint, dies_at="c"), ignore)
    assert not out.exists()
    return out.with_name(f"tmp-{out.name}")


def test_it_goes_on_after_a_kill(tmp_path: Path) -> None:
    kill_at_the_third(tmp_path / "out")
    told: list[int] = []
    files, kept = write_export(tmp_path / "out", plan(), told.append)
    assert kept == NAMES[:2]
    assert list(files) == NAMES
    assert sum(told) == 120
    assert not (tmp_path / "tmp-out").exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "lost"])
def test_a_kept_file_that_changed_is_written_again(damage: str, tmp_path: Path) -> None:
    write_export(tmp_path / "undisturbed", plan(), ignore)
    file = kill_at_the_third(tmp_path / "out") / NAMES[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    {"flipped": lambda: file.write_bytes(content), "cut": lambda: file.write_bytes(content[:-9]), "lost": file.unlink}[damage]()
    _, kept = write_export(tmp_path / "out", plan(), ignore)
    assert kept == [NAMES[1]]
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_files_of_another_source_are_never_kept(tmp_path: Path) -> None:
    kill_at_the_third(tmp_path / "out", fingerprint="a")
    _, kept = write_export(tmp_path / "out", plan("b", factor=7), ignore)
    assert kept == []
    with pytest.raises(ConfigError, match="another export lies here"):
        write_export(tmp_path / "out", plan("a"), ignore)


def test_a_finished_export_that_was_damaged_is_mended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    files, _ = write_export(out, plan(), ignore)
    (out / "config.json").write_text('{"mine": 1}')
    with (out / NAMES[1]).open("r+b") as file:
        file.write(b"\xff")
    found, kept = write_export(out, plan(), ignore)
    assert kept == [NAMES[0], NAMES[2]]
    assert found == files
    assert json.loads((out / "config.json").read_text()) == {"mine": 1}, "what was changed since stays"


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("out", "tmp-out"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.txt").write_text("all of it")
        with pytest.raises(ConfigError, match=f"{name}: something else lies here"):
            write_export(tmp_path / "out", plan(), ignore)
        assert (folder / "thesis.txt").read_text() == "all of it"
        shutil.rmtree(folder)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="something else lies here"):
        write_export(tmp_path / "out", plan(), ignore)
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    assert write_export(tmp_path / "out", plan(), ignore)[1] == [], "an empty folder will do"


def test_room_is_looked_for_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage._replace(free=export.SPARE_BYTES + 119))
    with pytest.raises(CheckpointError, match=r"the disk is too small, expected 0.0 GB, found 0.0 GB"):
        write_export(tmp_path / "out", plan(dies_at="a"), ignore)
    kept = tmp_path / "kept"
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage)
    kill_at_the_third(kept)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage._replace(free=export.SPARE_BYTES + 40))
    assert write_export(kept, plan(), ignore)[1] == NAMES[:2], "what is kept needs no room"
