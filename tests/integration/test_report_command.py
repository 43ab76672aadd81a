"""`guardtrain evaluate --report`: a real guard, a file, a benchmark's copy, another guard; what the files say, and mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refused

FRESH = 20


@pytest.fixture
def fresh(tmp_path: Path, rows_file: str) -> Path:
    """Rows of their own, and behind them three that the run was trained on or held out."""
    labels = ["malicious" if number % 2 else "benign" for number in range(FRESH)]
    lines = [json.dumps({"id": f"own-{n}", "prompt": f"Row {n} <script>", "label": label}) for n, label in enumerate(labels)]
    path = tmp_path / "fresh.jsonl"
    path.write_text("\n".join([*lines, *Path(rows_file).read_text().splitlines()]) + "\n")
    return path


@pytest.fixture
def over_refusal(tmp_path: Path) -> Path:
    """A copy of a benign-only benchmark in its own format."""
    path = tmp_path / "copy.csv"
    path.write_text("prompt,category\n" + "".join(f"How do I kill process {n}?,violence\n" for n in range(4)))
    return path


def test_a_report_of_two_sets_and_another_guard(
    guardtrain: Any, tiny_run: Any, tiny_folder: str, tmp_path: Path, fresh: Path, over_refusal: Path
) -> None:
    called = guardtrain(*tiny_run("train.max_steps=2", "evaluate.modes=[off,on,both]"))
    assert called.code == 0, called.err
    run, out = tmp_path / "run", tmp_path / "out"
    summary = json.loads((run / "summary.json").read_text())
    arguments = [run, fresh, f"or-bench-hard={over_refusal}", "--report", out, "--against", f"untuned={tiny_folder}"]
    called = guardtrain("evaluate", *arguments, "--timed-rows", "2", "--sampled-rows", "3")
    assert called.code == 0, called.err
    report = json.loads((out / "report.json").read_text())
    own, benign = report["sets"]
    assert (own["name"], own["axis"], benign["name"], benign["axis"]) == ("fresh.jsonl", "mixed", "or-bench-hard", "over-refusal")
    # What the run was trained on is found and left out; what it held out, and fresh rows, stay.
    assert len(own["contaminated"]) >= summary["training_rows"]
    assert own["modes"]["both"]["rows"] == FRESH + 40 - len(own["contaminated"])
    assert set(own["modes"]) == {"off", "on", "both", "cascade"}
    assert set(own["controls"]) == {"untuned", "TF-IDF + logistic regression"}
    assert benign["modes"]["off"]["auroc"] is None
    assert benign["modes"]["off"]["rows"] == 4
    assert own["modes"]["off"]["threshold"] == pytest.approx(summary["thresholds"]["off"], abs=1e-6)
    assert report["training_rows"] == summary["training_rows"]
    assert set(report["speed"]) == {"off", "on", "both", "cascade"}
    assert 0 <= report["flip_rate"] <= 1
    assert 0 <= report["escalation_rate"] <= 1
    assert report["command"].startswith("guardtrain evaluate")
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert re.search(r'<p class="status">calibrated on', page)
    assert (out / "report.md").read_text().startswith("**calibrated on")
    alone = json.loads(guardtrain("evaluate", run, fresh, "--modes", "off", "--json").out)
    assert alone["rows"] == FRESH + 40, "without a report every row counts"


def test_an_untuned_model_is_called_uncalibrated(guardtrain: Any, tiny_folder: str, tmp_path: Path, fresh: Path) -> None:
    out = tmp_path / "out"
    called = guardtrain("evaluate", tiny_folder, fresh, "--modes", "off", "--report", out, "--timed-rows", "0", "--hide-prompts")
    assert called.code == 0, called.err
    assert (out / "report.md").read_text().startswith("**uncalibrated")
    assert "Row 3" not in (out / "report.html").read_text() + (out / "report.md").read_text()
    report = json.loads((out / "report.json").read_text())
    assert (report["calibration"], report["speed"], report["flip_rate"]) == (None, {}, None)
    assert any("no guard of labels alone" in note for note in report["notes"])


def test_mistakes(guardtrain: Any, tiny_folder: str, tmp_path: Path, fresh: Path) -> None:
    report = ("--report", tmp_path / "out")
    check_refused(guardtrain("evaluate", tiny_folder, fresh, fresh, *report), "DATA", "named twice")
    check_refused(guardtrain("evaluate", tiny_folder, fresh, *report, "--json"), "--report", "cannot be combined", "--json")
    check_refused(guardtrain("evaluate", tiny_folder, "notinject=nowhere", *report), "notinject")
    check_refused(guardtrain("evaluate", tiny_folder, fresh, *report, "--against", "untuned"), "--against", "LEFT=RIGHT")
    check_refused(guardtrain("evaluate", tiny_folder, fresh, *report, "--modes", "cascade"), "cascade", "calibrated guard")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_benchmarks_are_listed(guardtrain: Any) -> None:
    listed = json.loads(guardtrain("benchmarks", "--json").out)
    assert len(listed) == 18
    table = guardtrain("benchmarks").out
    for each in listed:
        assert each["name"] in table
        assert each["licence"] in table
        assert each["hub"] or each["files"]
