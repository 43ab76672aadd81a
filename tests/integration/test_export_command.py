"""`guardtrain export` of runs in one process: what is taken, what is said, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refused
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by method, each trained once."""
    return {"folder": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def run_of(trained: dict[str, Path], guardtrain: Any, tiny_run: Any, tmp_path: Path) -> Any:
    """`run_of("full")`: a copy of a finished run with checkpoints 2 and 4."""

    def call(method: str) -> Path:
        if method not in trained:
            trained[method] = trained["folder"] / method
            options = ["train.max_steps=4", "train.save_steps=2", "train.watch_steps=0", "evaluate.max_rows=8"]
            methods = {"freeze": ["model.trained_layers=1"], "qlora": ["model.lora_rank=4"]}.get(method, [])
            called = guardtrain(*tiny_run(f"model.method={method}", *options, *methods, f"output.dir={trained[method]}"))
            assert called.code == 0, called.err
        shutil.copytree(trained[method], tmp_path / method)
        return tmp_path / method

    return call


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_the_finished_model_and_a_checkpoint(method: str, run_of: Any, guardtrain: Any) -> None:
    run = run_of(method)
    called = guardtrain("export", run, "--to", "merged")
    assert called.code == 0, called.err
    out = run / "exported" / "merged-model"
    assert str(out) in called.out
    for path in (run / "model").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    called = guardtrain("export", run, "--to", "merged", "--checkpoint", "checkpoint-4", "--shard-gb", "0.0001", "--json")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    assert len(found["files"]) > 2
    weights = {name: value for file in found["files"] for name, value in load_file(Path(found["out"]) / file).items()}
    expected = load_file(run / "model" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)
    again = json.loads(
        guardtrain("export", run, "--to", "merged", "--checkpoint", "checkpoint-4", "--shard-gb", "0.0001", "--json").out
    )
    assert again["kept"] == list(found["files"])


def test_without_a_finished_model_the_newest_valid_checkpoint_is_taken(run_of: Any, guardtrain: Any) -> None:
    run = run_of("full")
    shutil.rmtree(run / "model")
    with (run / "checkpoints" / "checkpoint-4" / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff")
    called = guardtrain("export", run, "--to", "merged", "--json")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    assert found["source"].endswith("checkpoint-2")
    assert found["skipped"] == [{"checkpoint": "checkpoint-4", "problem": "model.safetensors was changed: its hash differs"}]
    assert "checkpoint-4 is not used: model.safetensors was changed" in called.err
    refused = guardtrain("export", run, "--to", "merged", "--checkpoint", "checkpoint-4")
    check_refused(refused, "checkpoint-4", "cannot be trusted", "hash differs")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    check_refused(guardtrain("export", run, "--to", "merged"), "nothing to export", "checkpoint-2", "checkpoint-4")


def test_an_adapter_on_4_bit_weights_goes_into_the_base_models_own(
    run_of: Any, guardtrain: Any, tiny_folder: str, tmp_path: Path
) -> None:
    from guardtrain.inference.guards import load_guard

    run = run_of("qlora")
    called = guardtrain("export", run, "--to", "merged", "--out", tmp_path / "out")
    assert called.code == 0, called.err
    assert "not into the 4-bit ones" in called.err
    measured, exported = (load_guard(str(folder)).model.state_dict() for folder in (run, tmp_path / "out"))
    base = load_file(Path(tiny_folder) / "model.safetensors")
    for name, value in measured.items():
        assert value.allclose(exported[name], rtol=1e-6, atol=1e-6), name
    assert any((base[name] != exported[name]).any() for name in base)
    called = guardtrain("export", run, "--to", "merged", "--dtype", "bfloat16", "--out", tmp_path / "half")
    assert called.code == 0, called.err
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    halves = load_file(tmp_path / "half" / "model.safetensors")
    assert all((value == exported[name].bfloat16()).all() for name, value in halves.items())
    assert guardtrain("export", run, "--to", "adapter").code == 0
    copy = run / "exported" / "adapter-model"
    for path in (run / "model").iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (copy / path.name).read_bytes(), path.name


def test_mistakes(run_of: Any, guardtrain: Any, tmp_path: Path) -> None:
    run = run_of("full")
    merged = ["export", run, "--to", "merged"]
    check_refused(guardtrain("export", tmp_path / "none", "--to", "merged"), "none", "not a run", "no such folder")
    check_refused(guardtrain("export", tmp_path, "--to", "merged"), "not a run", "recipe.yaml")
    check_refused(guardtrain("export", run, "--to", "onnx"), "--to", "merged or adapter or gguf", "onnx")
    check_refused(guardtrain("export", run, "--to", "adapter"), "--to adapter", "model.method=full")
    check_refused(guardtrain(*merged, "--dtype", "int3"), "--dtype", "float16", "int3")
    check_refused(guardtrain(*merged, "--shard-gb", "0"), "--shard-gb")
    check_refused(guardtrain(*merged, "--checkpoint", "checkpoint-9"), "checkpoint-9", "checkpoint-2, checkpoint-4")
    check_refused(guardtrain(*merged, "--out", run / "model"), "something else lies here")
    check_refused(guardtrain(*merged, "--out", "/proc/nowhere/out"), "could not be written")
    (run / "checkpoints" / "checkpoint-4" / "guard.json").unlink()
    check_refused(guardtrain(*merged, "--checkpoint", "checkpoint-4"), "guard.json is missing")
    assert not (run / "exported").exists()
    assert sorted(path.name for path in (run / "model").iterdir() if path.name == "export.json") == []


def test_a_checkpoint_can_be_used_as_it_is(run_of: Any, guardtrain: Any, rows_file: str) -> None:
    """A plain one holds whole weights, and now all that a guard needs beside them."""
    called = guardtrain("evaluate", run_of("full") / "checkpoints" / "checkpoint-4", rows_file, "--modes", "off")
    assert called.code == 0, called.err
