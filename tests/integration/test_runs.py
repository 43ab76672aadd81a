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
from tiny_models import build_windowed


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
    assert f"{summary['held_out_loss']['after']:.4f} after" in called.out
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
    resumed = guardtrain(*tiny_run(f"output.dir={parts}", "train.save_steps=4"), "--resume")
    assert resumed.code == 0, resumed.err
    assert f"checkpoint-{steps[0]}" in resumed.err
    assert metrics_of(parts, "loss") == metrics_of(whole, "loss")  # no step lost or twice in the log
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


def test_rejects_in_the_run_folder_are_kept_and_counted_by_row(
    guardtrain: Any, tiny_run: Any, tmp_path: Path, rows_file: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    twice_bad = {"prompt": "", "label": "malicious", "reason": "It is malicious. And it has two sentences."}
    rows.write_text(Path(rows_file).read_text() + json.dumps(twice_bad) + "\n")
    rejects = tmp_path / "run" / "bad.jsonl"
    called = guardtrain(*tiny_run(f"data.train={rows}", f"data.rejects={rejects}", "train.max_steps=1"))
    assert called.code == 0, called.err
    assert "1 bad rows set aside" in called.err
    assert {json.loads(line)["where"] for line in rejects.read_text().splitlines()} == {f"{rows}:41"}


def test_rows_without_reasons_make_a_guard_of_mode_off(guardtrain: Any, tiny_run: Any, tmp_path: Path, rows_file: str) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    rows.write_text("".join(json.dumps({**line, "reason": None}) + "\n" for line in lines))
    called = guardtrain(*tiny_run(f"data.train={rows}", "train.max_steps=1", "evaluate.modes=[off,on,both]"))
    assert called.code == 0, called.err
    guard = json.loads((tmp_path / "run" / "model" / "guard.json").read_text())
    assert (guard["modes"], list(guard["calibration"]["modes"])) == (["off"], ["off"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["held_out"]["modes"]["off"]["threshold"] == pytest.approx(summary["thresholds"]["off"], abs=1e-6)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("".join(json.dumps({"ask": line["prompt"], "mark": line["label"][:3]}) + "\n" for line in lines))
    mapping = ["--column", "prompt=ask", "--column", "label=mark", "--label", "mal=malicious", "--label", "ben=benign"]
    evaluated = guardtrain("evaluate", tmp_path / "run", foreign, *mapping, "--json")
    assert evaluated.code == 0, evaluated.err
    assert list(json.loads(evaluated.out)["modes"]) == ["off"]
    refused = guardtrain(*tiny_run(f"data.train={rows}", "evaluate.modes=[on]", f"output.dir={tmp_path / 'other'}"))
    assert refused.code == 2
    assert "no mode is both trained and measured" in refused.err


def test_an_adapter_remembers_its_base(
    guardtrain: Any, tiny_run: Any, tiny_folder: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also when the working directory has changed since."""
    monkeypatch.chdir(Path(tiny_folder).parent)
    arguments = tiny_run("model.method=lora", f"model.name=./{Path(tiny_folder).name}", "model.revision=v1", "train.max_steps=1")
    assert guardtrain(*arguments).code == 0
    guard = json.loads((tmp_path / "run" / "model" / "guard.json").read_text())
    assert (guard["base_model"], guard["revision"]) == (tiny_folder, "v1")


def test_changed_data_are_not_resumed(guardtrain: Any, tiny_run: Any, tmp_path: Path, rows_file: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Path(rows_file).read_text())
    assert guardtrain(*tiny_run(f"data.train={rows}", "train.save_steps=2", "train.max_steps=4")).code == 0
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "One more question about rows.", "label": "benign"}) + "\n")
    refused = guardtrain(*tiny_run(f"data.train={rows}", "train.save_steps=2", "train.max_steps=4"), "--resume")
    assert refused.code == 2
    assert "the training data have changed" in refused.err


def test_a_run_that_ended_keeps_its_mark_when_it_is_resumed(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    """As after Ctrl-C while it was measured: no step is left to look at."""
    arguments = tiny_run("train.learning_rate=0.9", "train.epochs=3", "task.modes=[off]")
    assert guardtrain(*arguments).code == 0
    (tmp_path / "run" / "model" / "guard.json").unlink()
    assert guardtrain(*arguments, "--resume").code == 0
    assert json.loads((tmp_path / "run" / "model" / "guard.json").read_text())["collapsed"]


def test_a_folder_with_a_recipe_of_its_own_is_not_overwritten(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("task: guard\n")
    (tmp_path / "thesis.txt").write_text("three years")
    called = guardtrain(*tiny_run(f"output.dir={tmp_path}", "output.overwrite=true"))
    assert called.code == 2
    assert "the folder is not a run's" in called.err
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_repeating_a_saved_recipe_does_not_delete_its_run(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    assert guardtrain(*tiny_run("output.overwrite=true")).code == 0
    weights = tmp_path / "run" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = guardtrain("train", str(tmp_path / "run" / "recipe.yaml"))
    assert again.code == 2
    assert "the run folder is not empty" in again.err
    assert weights.stat().st_mtime_ns == before


def test_ranks_that_no_launcher_started_are_refused(guardtrain: Any, tiny_run: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    called = guardtrain(*tiny_run())
    assert called.code == 2
    assert "WORLD_SIZE" in called.err


def test_check_looks_at_the_machine_and_trains_nothing(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    called = guardtrain(*tiny_run(), "--check")
    assert called.code == 0, called.err
    assert "fit for this run" in called.out
    assert not (tmp_path / "run").exists()


def test_slurm_tasks_that_no_launcher_joined_are_refused(guardtrain: Any, tiny_run: Any, monkeypatch: Any) -> None:
    """`srun guardtrain train` would train as many times as there are tasks, into one folder."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    called = guardtrain(*tiny_run())
    assert called.code == 2
    assert "8 tasks" in called.err
    assert "slurm/train.sbatch" in called.err


def test_rows_longer_than_a_sliding_window_train_and_are_measured(
    guardtrain: Any, tiny_run: Any, tmp_path: Path, smol_tokenizer: Any
) -> None:
    build_windowed("mistral", vocab_size=len(smol_tokenizer), window=30).save_pretrained(tmp_path / "mistral")
    smol_tokenizer.save_pretrained(tmp_path / "mistral")
    called = guardtrain(*tiny_run(f"model.name={tmp_path / 'mistral'}"))
    assert called.code == 0, called.err
