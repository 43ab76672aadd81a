"""`guardtrain bench step` with real peers: all of them must have trained the same thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def bench(guardtrain: Any, tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    fixed = (f"model.name={tiny_folder}", "model.dtype=float32", "train.learning_rate=1e-3", "--steps", "2", "--rows", "8")
    return lambda *arguments: guardtrain("bench", "step", "guard", *fixed, *arguments)


def test_four_contenders_train_the_same(bench: Any, rows_file: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the extra bench is not installed")
    file = tmp_path / "step.json"
    called = bench(f"data.train={rows_file}", "--policy-tokens", "60", "--batch-sizes", "4", "--json-file", file)
    assert called.code == 0, called.err
    assert "times the rows/s of" in called.out
    results = json.loads(file.read_text())
    assert list(results["contenders"]) == ["guardtrain", "trl-padded", "trl-packed", "trainer"]
    assert results["samples_of_peers"] == 16
    for name, figures in results["contenders"].items():
        assert len(figures["losses"]) == 2
        assert figures["losses"][1] < figures["losses"][0]
        # TRL's fused head rounds a little differently.
        assert figures["gradient_error_against_trainer"] < (1e-5 if name == "guardtrain" else 1e-4), name
        assert figures["loss_error_against_trainer"] < 1e-5, name
    tokens = {name: figures["computed_tokens_of_a_step"] for name, figures in results["contenders"].items()}
    assert tokens["guardtrain"] == results["tokens"]["once"] < results["tokens"]["copied"] == tokens["trl-packed"]
    assert tokens["trainer"] == tokens["trl-padded"] >= tokens["trl-packed"]


def test_chats_without_a_policy(bench: Any, tmp_path: Path) -> None:
    rows = tmp_path / "chats.jsonl"
    rows.write_text(
        "".join(json.dumps({"instruction": f"What is {n} and {n}?", "response": f"It is {2 * n}."}) + "\n" for n in range(12))
    )
    called = bench(f"data.train={rows}", "task.kind=instruct", "--contenders", "guardtrain,trainer", "--json")
    assert called.code == 0, called.err
    results = json.loads(called.out)
    assert results["policy_tokens"] == 0
    assert results["contenders"]["guardtrain"]["gradient_error_against_trainer"] < 1e-5


def test_mistakes_are_named(bench: Any, rows_file: str) -> None:
    called = bench(f"data.train={rows_file}", "--batch-sizes", "4,x")
    assert called.code == 2
    assert "--batch-sizes: not a list of numbers, expected for example 4,8, found 4,x" in called.err
    called = bench(f"data.train={rows_file}", "--contenders", "axolotl")
    assert called.code == 2
    assert "no such contender" in called.err
