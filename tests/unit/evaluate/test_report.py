"""What people see of an evaluation."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from guardtrain.evaluate.report import COLUMNS, measures_table
from guardtrain.evaluate.runner import Evaluation
from guardtrain.evaluate.scores import measure


@pytest.fixture
def evaluation() -> Evaluation:
    rng = np.random.default_rng(5)
    measures = measure(rng.normal(size=20_000), rng.random(20_000) > 0.5)
    return Evaluation(examples=[], scored=[], measures={"off": measures, "on": measures, "both": measures}, seconds=1.0)


@pytest.mark.parametrize("width", [80, 120])
def test_no_figure_is_shortened_on_a_narrow_terminal(evaluation: Evaluation, width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(measures_table({"before": evaluation, "a-very-long-name": evaluation}, title="Title"))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    figures = [f"{getattr(evaluation.measures['off'], key):.3f}" for key in COLUMNS]
    rows = [line.split() for line in lines]
    for mode in ("off", "on", "both"):
        assert [row[row.index(mode) :] for row in rows if mode in row] == 2 * [[mode, "20000", *figures, "0"]]
    assert next(row for row in rows if "off" in row)[0] == "before"


def test_what_a_set_of_one_class_lacks_is_a_dash() -> None:
    measures = measure(np.array([1.0, -1.0]), np.zeros(2, dtype=bool))
    out = io.StringIO()
    Console(file=out, width=80).print(measures_table({"benign": Evaluation(measures={"off": measures}, examples=[], scored=[])}))
    (row,) = (line.split() for line in out.getvalue().splitlines() if line.split()[:1] == ["off"])
    assert row == ["off", "2", "–", "–", "–", "–", "–", "0.500", "0.500", "0"]


def test_a_lone_set_names_the_table_however_long_its_name_is(evaluation: Evaluation) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(measures_table({"my-own-rows-of-last-week.jsonl": evaluation}))
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "my-own-rows-of-last-week.jsonl"
    assert [line.split()[:2] for line in lines[-4:-1]] == [["off", "20000"], ["on", "20000"], ["both", "20000"]]
