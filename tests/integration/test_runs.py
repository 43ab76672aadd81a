"""Whole runs of a tiny model: every method and task, the files they leave, and equivalences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def metrics_of(run: Path, key: str) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def check_trained(called: Any, run: Path) -> dict[str, Any]:
    assert called.code == 0, called.err
    for name in ("recipe.yaml", "metrics.jsonl", "train.log", "summary.json", "model/tokenizer.json"):
        assert (run / name).is_file(), name
    losses = metrics_of(run, "loss")
    assert losses[-1] < losses[0]
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


@pytest.mark.parametrize("method", ["full", "lora", "freeze", "qlora"])
def test_every_method_trains_and_its_guard_loads(
    guardtrain: Any, tiny_run: Any, tmp_path: Path, rows_file: str, method: str
) -> None:
    overrides = [f"model.method={method}", "model.trained_layers=1", "model.lora_rank=4"]
    summary = check_trained(guardtrain(*tiny_run(*overrides)), tmp_path / "run")
    assert set(summary["thresholds"]) == {"off"}
    saved = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert ("adapter_model.safetensors" in saved) == (method in {"lora", "qlora"})
    evaluated = guardtrain("evaluate", tmp_path / "run", rows_file, "--modes", "off,on,both", "--json")
    assert evaluated.code == 0, evaluated.err
    figures = json.loads(evaluated.out)
    assert figures["is_trained"]
    assert set(figures["modes"]) == {"off", "on", "both"}
    assert figures["modes"]["off"]["threshold"] == pytest.approx(summary["thresholds"]["off"], abs=1e-6)


def test_a_run_folder_is_evaluated_as_the_run_measured_itself(
    guardtrain: Any, tiny_run: Any, tmp_path: Path, rows_file: str
) -> None:
    """Held-out rows given as a file: the run's own figures and those of `evaluate` on its folder are the same."""
    lines = Path(rows_file).read_text().splitlines()
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    held.write_text("\n".join(lines[:12]) + "\n")
    train.write_text("\n".join(lines[12:]) + "\n")
    called = guardtrain(*tiny_run(f"data.train={train}", f"data.validation={held}"))
    summary = check_trained(called, tmp_path / "run")
    evaluated = json.loads(guardtrain("evaluate", tmp_path / "run", held, "--modes", "off", "--json").out)
    assert evaluated["modes"]["off"]["auroc"] == summary["held_out"]["modes"]["off"]["auroc"]


def test_validation_rows_that_stand_in_training_are_refused(guardtrain: Any, tiny_run: Any, rows_file: str) -> None:
    called = guardtrain(*tiny_run(f"data.validation={rows_file}"))
    assert called.code == 2
    assert "validation row also in training" in called.err


def test_instruct_rows_train_on_the_same_trainer(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    rows = [{"instruction": f"What does port {port} carry?", "response": f"Port {port} carries a service."} for port in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    called = guardtrain(*tiny_run("task=instruct", f"data.train={path}", "train.epochs=4"))
    summary = check_trained(called, tmp_path / "run")
    assert "thresholds" not in summary
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]
    assert not (tmp_path / "run" / "model" / "guard.json").exists()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_resumed_equals_uninterrupted(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    """A run that stopped at step 4 and resumed has the weights, bit for bit, of one that never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert guardtrain(*tiny_run(f"output.dir={whole}", "train.save_steps=4")).code == 0
    assert guardtrain(*tiny_run(f"output.dir={parts}", "train.save_steps=4")).code == 0
    assert metrics_of(whole, "epoch")[-1] == 2  # two passes over the rows, though the Trainer sees one stream
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (parts / "checkpoints").iterdir())
    assert len(steps) == 2
    newest = parts / "checkpoints" / f"checkpoint-{steps[1]}"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    before = (parts / "metrics.jsonl").read_text().count("\n")
    resumed = guardtrain(*tiny_run(f"output.dir={parts}", "train.save_steps=4"), "--resume")
    assert resumed.code == 0, resumed.err
    assert f"checkpoint-{steps[0]}" in resumed.err
    assert (parts / "metrics.jsonl").read_text().count("\n") > before
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(parts).items())


def test_accumulation_equals_one_large_step(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    """Two packs a step train as one pack of both, though their numbers of supervised tokens differ."""
    small, large = tmp_path / "small", tmp_path / "large"
    common = ["train.max_steps=1", "train.warmup_ratio=0", "train.watch_steps=0"]
    assert guardtrain(*tiny_run(f"output.dir={large}", "train.pack_tokens=100000", *common)).code == 0
    assert guardtrain(*tiny_run(f"output.dir={small}", "train.packs_per_step=9", "train.pack_tokens=512", *common)).code == 0
    (loss_large,), (loss_small,) = metrics_of(large, "loss"), metrics_of(small, "loss")
    (norm_large,), (norm_small,) = metrics_of(large, "grad_norm"), metrics_of(small, "grad_norm")
    assert loss_small == pytest.approx(loss_large, rel=1e-5)
    assert norm_small == pytest.approx(norm_large, rel=1e-4)


def test_collapse_is_said_and_marks_the_run(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    """A learning rate that destroys the model makes it say one thing of everything."""
    called = guardtrain(*tiny_run("train.learning_rate=0.9", "train.epochs=3", "task.modes=[off]"))
    assert called.code == 0, called.err
    assert "COLLAPSE" in called.err
    guard = json.loads((tmp_path / "run" / "model" / "guard.json").read_text())
    assert "the guard flags" in guard["collapsed"]
    assert set(metrics_of(tmp_path / "run", "watch_flagged")) & {0.0, 1.0}


def test_json_is_all_that_standard_output_holds(tiny_run: Any) -> None:
    """In a process of its own: libraries that print while they are imported must not get between."""
    command = [sys.executable, "-c", "from guardtrain.cli import main; main()", *tiny_run("train.max_steps=1"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["steps"] == 1


def test_quickstart_measures_before_and_after(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    overrides = tiny_run()[2:]
    called = guardtrain("quickstart", "--out", tmp_path / "quick", "--json", *[o for o in overrides if "output.dir" not in o])
    assert called.code == 0, called.err
    report = json.loads(called.out)
    assert report["before"]["rows"] == report["after"]["held_out"]["rows"]
    shown = guardtrain("quickstart", "--out", tmp_path / "quick", *[o for o in overrides if "output.dir" not in o])
    assert "before" in shown.out
    assert "Sample verdicts" in shown.out
