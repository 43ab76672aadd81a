"""What watches a run says what it sees."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from guardtrain.train.callbacks import CollapseWatch

LABELS = [True, True, False, False]


def watch(scores: list[float], path: Path) -> CollapseWatch:
    return CollapseWatch(lambda: scores, LABELS, every_steps=1, path=path / "metrics.jsonl")


def test_a_healthy_guard_has_no_problem(tmp_path: Path) -> None:
    seen = watch([1.0, 2.0, -1.0, 3.0], tmp_path).look(5)
    assert (seen.problem, seen.flagged, seen.auroc, seen.gap) == (None, 0.75, 0.5, 0.5)


@pytest.mark.parametrize(("score", "word"), [(1.0, "everything"), (-1.0, "nothing")])
def test_the_same_verdict_for_everything_is_a_problem(tmp_path: Path, score: float, word: str) -> None:
    looking = watch([score] * 4, tmp_path)
    looking.look(5)
    assert looking.problem == f"the guard flags {word} at step 5"


@pytest.mark.parametrize("scores", [[math.nan] * 4, [math.inf, 1.0, 2.0, 3.0]])
def test_scores_that_are_no_numbers_are_said_and_do_not_crash(tmp_path: Path, scores: list[float]) -> None:
    looking = watch(scores, tmp_path)
    looking.look(5)
    assert "training has diverged" in str(looking.problem)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["watch_auroc"] is None
