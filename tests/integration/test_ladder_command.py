"""`guardtrain ladder`: three guards from the same rows, one table, one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refusals import check_refused

from guardtrain.data.hashes import RowHashes


def test_three_guards_from_the_same_rows(
    guardtrain: Any, tiny_run: Any, tmp_path: Path, rows_file: str, monkeypatch: Any
) -> None:
    from guardtrain.train import ladder

    traps = ladder.load_traps()[:6]
    monkeypatch.setattr(ladder, "load_traps", lambda: traps)  # eighty would take a minute
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    some = sorted({row["pair"] for row in rows})[::2]  # a draw that minds the modes would take other rows for other attempts
    half = tmp_path / "half.jsonl"
    half.write_text("".join(json.dumps(row if row["pair"] in some else {**row, "reason": None}) + "\n" for row in rows))
    arguments = tiny_run(f"data.train={half}", "train.max_steps=2", "evaluate.modes=[off,on,both]", "data.max_rows=20")
    called = guardtrain("ladder", *arguments[1:], "--json")
    assert called.code == 0, called.err
    rungs = json.loads(called.out)
    assert [(rung["attempt"], rung["mode"]) for rung in rungs] == [
        ("labels alone, base model", "off"),
        ("labels alone, engineered policy", "off"),
        ("reasoned", "off"),
        ("reasoned", "on"),
        ("reasoned", "both"),
    ]
    folder = tmp_path / "run"
    digests = [RowHashes.read(folder / name / "model").digests_N.tolist() for name in ("labels", "engineered", "reasoned")]
    assert digests[0] == digests[1] == digests[2], "one draw of rows for all"
    assert 0 < len(digests[0]) <= 20, "pairs stay whole"
    policies = [json.loads((folder / name / "model" / "guard.json").read_text())["policy"] for name in ("labels", "engineered")]
    assert policies[0] != policies[1]
    for rung in rungs:
        assert rung["num_traps"] == 6
        assert 0 <= rung["traps"] <= 1
        summary = json.loads((Path(rung["folder"]) / "summary.json").read_text())
        assert rung["measures"]["auroc"] == summary["held_out"]["modes"][rung["mode"]]["auroc"]
    assert json.loads((folder / "ladder.json").read_text()) == rungs
    assert (folder / "ladder.png").stat().st_size > 10_000


def test_a_ladder_needs_a_reasoned_guard_at_its_end(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    check_refused(guardtrain("ladder", *tiny_run("task.modes=[off]")[1:]), "task.modes", "off and on", "guard, off")
    assert not (tmp_path / "run").exists()
