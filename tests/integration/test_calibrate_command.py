"""`guardtrain calibrate`: what it writes, what `evaluate` makes of it, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run in both modes, trained once."""
    return {"folder": tmp_path_factory.mktemp("calibrate")}


@pytest.fixture
def run(trained: dict[str, Path], guardtrain: Any, tiny_run: Any, tmp_path: Path) -> Path:
    """A copy of it."""
    if "run" not in trained:
        out = trained["folder"] / "run"
        called = guardtrain(*tiny_run("evaluate.modes=[off,on,both]", "task.max_reason_tokens=8", f"output.dir={out}"))
        assert called.code == 0, called.err
        trained["run"] = out
    return shutil.copytree(trained["run"], tmp_path / "run")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Rows that nobody trained on."""
    labels = ["malicious" if number % 2 else "benign" for number in range(24)]
    lines = [json.dumps({"prompt": f"A row of its own, number {n}.", "label": label}) for n, label in enumerate(labels)]
    path = tmp_path / "fresh.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def settings_of(run: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((run / "model" / "guard.json").read_text())
    return settings


def test_a_run_is_calibrated_on_its_held_out_rows(run: Path) -> None:
    calibration = settings_of(run)["calibration"]
    summary = json.loads((run / "summary.json").read_text())
    assert (calibration["method"], calibration["data"]) == ("rows", ["the run's held-out rows"])
    assert calibration["rows"] == summary["held_out_rows"]
    assert set(calibration["modes"]) == {"off", "on", "both"}
    low, high = settings_of(run)["cascade"]
    assert low <= summary["thresholds"]["off"] <= high


def test_calibrating_anew_changes_what_is_measured(run: Path, guardtrain: Any, fresh: Path) -> None:
    before = settings_of(run)
    called = guardtrain("calibrate", run, fresh, "--fpr", "0.3", "--json")
    assert called.code == 0, called.err
    said, after = json.loads(called.out), settings_of(run)
    assert after["calibration"] == {key: value for key, value in said.items() if key != "cascade"}
    assert (said["data"], said["rows"], said["malicious"], said["target_fpr"]) == (["fresh.jsonl"], 24, 12, 0.3)
    assert said["data_hash"] != before["calibration"]["data_hash"]
    assert {key: value for key, value in after.items() if key not in {"calibration", "cascade"}} == {
        key: value for key, value in before.items() if key not in {"calibration", "cascade"}
    }
    evaluated = json.loads(guardtrain("evaluate", run, fresh, "--json").out)
    assert set(evaluated["modes"]) == {"off", "on", "both", "cascade"}
    for mode, each in said["modes"].items():
        measured = evaluated["modes"][mode]
        assert measured["threshold"] == pytest.approx(each["threshold"], abs=1e-6)
        assert flagged_benign(evaluated, mode) <= 0.3
    assert flagged_benign(evaluated, "cascade") <= 0.3


def flagged_benign(evaluated: dict[str, Any], mode: str) -> float:
    """By score alone: the false alarms of a random model are all its rows, for it writes no verdict of its own."""
    (flagged,) = (each["flagged"] for key, each in evaluated["flagged_by_source"][mode].items() if key.endswith("/benign"))
    return float(flagged)


def test_people_see_a_table_and_every_warning(run: Path, guardtrain: Any, fresh: Path) -> None:
    called = guardtrain("calibrate", run, fresh)
    assert called.code == 0, called.err
    assert "24 rows (12 malicious) of fresh.jsonl" in " ".join(called.out.split())
    assert [line.split()[0] for line in called.out.splitlines() if line.split()[:1] and line.split()[0] in {"off", "on", "both"}]
    assert "warning: recall at 1 % FPR allows no false alarm at all" in " ".join(called.err.split())


def test_without_data(run: Path, guardtrain: Any, fresh: Path) -> None:
    called = guardtrain("calibrate", run, "--without-data", "--json")
    assert called.code == 0, called.err
    assert json.loads(called.out)["method"] == settings_of(run)["calibration"]["method"] == "contextual"
    assert settings_of(run)["cascade"] is None
    evaluated = guardtrain("evaluate", run, fresh, "--modes", "off")
    assert "calibrated without data" in " ".join(evaluated.out.split())


def test_mistakes_leave_the_guard_as_it_was(
    run: Path, guardtrain: Any, fresh: Path, rows_file: str, tiny_folder: str, tmp_path: Path
) -> None:
    before = (run / "model" / "guard.json").read_bytes()
    check_refused(guardtrain("calibrate", run, rows_file), "rows.jsonl:", "the guard was trained on this row", "held-out rows")
    check_refused(guardtrain("calibrate", run), "DATA", "labelled rows or --without-data", "neither")
    check_refused(guardtrain("calibrate", run, fresh, "--without-data"), "DATA", "both")
    check_refused(guardtrain("calibrate", run, fresh, "--fpr", "1"), "--fpr", "between 0 and 1")
    check_refused(guardtrain("calibrate", tiny_folder, fresh), "only a trained guard")
    check_refused(guardtrain("calibrate", run, tmp_path / "none.jsonl"), "none.jsonl")
    one_class = tmp_path / "one.jsonl"
    one_class.write_text("".join(f'{{"prompt": "Benign, number {n}.", "label": "benign"}}\n' for n in range(3)))
    check_refused(guardtrain("calibrate", run, one_class), "both classes", "only benign rows")
    assert (run / "model" / "guard.json").read_bytes() == before


def test_a_guard_without_digests_says_that_it_cannot_know(run: Path, guardtrain: Any, fresh: Path) -> None:
    (run / "model" / "training_rows.json").unlink()
    called = guardtrain("calibrate", run, fresh, "--json")
    assert called.code == 0, called.err
    assert "it is not known whether these rows were trained on" in json.loads(called.out)["warnings"][-1]
