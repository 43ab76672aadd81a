"""`guardtrain secure compare` on a tiny random model: the whole of it, again without training, and refused when it changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refused

from guardtrain.config import ModelConfig
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.result import RobustModules, model_fingerprint
from guardtrain.secure.units import KINDS, Unit

SECRET = "zebra-lantern"  # in every request: nothing that is shown or written may hold it


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(thing: str) -> list[dict[str, str]]:
    """Enough minimal pairs for a probe."""
    words = {"malicious": "Break", "benign": "Oil"}
    return [
        {"prompt": f"{verb} the {thing} of house {number}", "label": label, "pair": str(number)}
        for number in range(24)
        for label, verb in words.items()
    ]


@pytest.fixture
def modules_file(tiny_folder: str, tmp_path: Path) -> Path:
    """What a search of the tiny model would have written."""
    units = {Unit(layer, kind): 0.01 * place for layer in range(2) for place, kind in enumerate(KINDS)}
    figures = ProbeFigures(0.8, 0.9, 1.0, 0.9)
    settings = {
        "data": write(tmp_path / "pairs.jsonl", pairs("lock")),
        "out_of_source": write(tmp_path / "others.jsonl", pairs("gate")),
        "pairs": {"fit": 12, "search": 6, "report": 6, "out of source": 12},
        "layer": None,
        "perturbation": "noise",
    }
    path = tmp_path / "modules.json"
    RobustModules(
        units=units,
        robust=tuple(list(units)[:6]),
        joint_drop=0.01,
        strength=0.5,
        tau=0.02,
        untouched=figures,
        checks=(),
        settings={**settings, "seed": 0},
        model=tiny_folder,
        model_hash=model_fingerprint(ModelConfig(name=tiny_folder)),
        data_hash="",
        made="2026-11-22",
    ).write(path)
    return path


@pytest.fixture
def arguments(tiny_folder: str, modules_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Of a comparison of the tiny model in tmp_path/out; what is given comes last."""
    words = ["red", "green", "blue", "seven", "eight", "north", "south", "wood", "stone", "rain"]
    rows = [
        {"instruction": f"Repeat {word}, then {words[number % 7]}", "response": f"{word} {words[number % 7]}"}
        for number, word in enumerate(words * 4)
    ]
    chat = write(tmp_path / "chat.jsonl", rows)
    requests = write(tmp_path / "requests.jsonl", [{"prompt": f"Do the {SECRET} thing number {number}"} for number in range(12)])

    def made(*more: str) -> list[str]:
        return [
            "secure",
            "compare",
            "instruct",
            f"model.name={tiny_folder}",
            "model.dtype=float32",
            f"data.train={chat}",
            "data.validation_fraction=0.3",
            "train.pack_tokens=256",
            "train.max_steps=3",
            "train.learning_rate=1e-3",
            f"secure.modules={modules_file}",
            f"--out={tmp_path / 'out'}",
            f"--harmful={requests}",
            "--answer-tokens=4",
            "--answered-rows=3",
            *more,
        ]

    return made


CONTROLS = ["untuned", "ordinary", "reversed", "mllr", "norm-matched", "score-matched"]


@pytest.mark.slow
def test_a_whole_comparison(guardtrain: Any, arguments: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = guardtrain(*arguments("--controls=untuned,ordinary", "--seeds=1"))
    assert first.code == 0, first.err
    assert "was not asked" in first.out
    made = {path.name: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    assert set(made) == {"untuned-17.json", "ordinary-17.json", "judge.json"}

    whole = arguments(f"--controls={','.join(CONTROLS)}", "--seeds=2", "--json")
    called = guardtrain(*whole)
    assert called.code == 0, called.err
    assert all((out / "measured" / name).stat().st_mtime_ns == time for name, time in made.items()), "nothing is done twice"
    check_report(json.loads(called.out))
    check_files(out, called.out + called.err + first.out + first.err)

    shutil.rmtree(out / "runs")
    assert json.loads(guardtrain(*whole).out) == json.loads(called.out), "from what was measured alone"
    check_refused(guardtrain(*whole, "train.learning_rate=2e-3"), "another comparison", "other recipe")


def check_report(report: dict[str, Any]) -> None:
    by_name = {line["control"]: line for line in report["controls"]}
    assert list(by_name) == CONTROLS
    assert "ML-LR" in report["verdict"]
    assert "same task score" in report["verdict"]
    assert report["decided_by"]["measure"] == "probe", "no judge was given, and a random model refuses nothing"
    assert any("No judge of harm" in said for said in report["warnings"])
    assert any("2 seeds" in said for said in report["warnings"])
    assert {*by_name["mllr"]["figures"]} >= {"refused", "probe", "probe_margin", "probe_elsewhere", "loss", "overlap"}
    for name, line in by_name.items():
        assert line["seeds"] == (1 if name == "untuned" else 2)
        assert line["figures"]["loss"]["mean"] > 1
    losses = {name: line["figures"]["loss"]["mean"] for name, line in by_name.items()}
    learnt = {name: losses["untuned"] - loss for name, loss in losses.items()}
    assert abs(learnt["score-matched"] / learnt["mllr"] - 1) <= 0.03
    for seed in range(2):
        norms = {name: each[seed] for name, each in report["update_norms"].items() if name != "untuned"}
        assert norms["mllr"]["update"] < norms["ordinary"]["update"]
        assert abs(norms["norm-matched"]["update"] / norms["mllr"]["update"] - 1) <= 0.03
        share = {name: each["robust"] / each["update"] for name, each in norms.items()}
        assert share["mllr"] > share["ordinary"] > share["reversed"], "where the update lies"


def check_files(out: Path, said: str) -> None:
    assert not list(out.glob("runs/*/model")), "weights are not kept"
    assert not list(out.glob("runs/*/checkpoints"))
    assert len(list(out.glob("runs/mllr-*/recipe.yaml"))) == 2, "what was done is"
    html, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert html.count("<svg") == 2
    assert "norm-matched" in text
    assert "keywords" in text
    assert (out / "differences.png").read_bytes()[:4] == b"\x89PNG"
    for path in out.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in said
    assert not list(out.rglob("tmp-*"))


def test_bad_input_is_refused_before_anything_is_trained(guardtrain: Any, arguments: Any, tmp_path: Path) -> None:
    check_refused(guardtrain(*arguments("--controls=typo")), "--controls", "typo")
    check_refused(guardtrain(*arguments("--judge=nobody")), "--judge", "nobody")
    check_refused(guardtrain(*arguments("task.kind=guard")), "task.kind", "instruct")
    check_refused(guardtrain(*arguments("--controls=ordinary,mix")), "control mix", "secure.safety_data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    check_refused(guardtrain(*arguments("--controls=ordinary")), "--out", "not a comparison's folder")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
