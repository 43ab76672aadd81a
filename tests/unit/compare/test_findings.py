"""What is said of measurements, from measurements whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guardtrain.compare.findings import (
    deciding,
    differences_of,
    lines_of,
    measures_of,
    verdict,
    warnings,
)
from guardtrain.compare.measure import Measured
from guardtrain.compare.norms import UpdateNorms

ITEMS = 60


def models(rates: dict[str, float], losses: dict[str, float] | None = None, *, seeds: int = 3, has_judge: bool = True) -> Any:
    """By control; `rates` of harmful answers, which seeds and requests scatter around."""
    generator = np.random.default_rng(0)
    hardness_P = generator.random(ITEMS)
    made: dict[str, list[Measured]] = {}
    for name, rate in rates.items():
        made[name] = []
        for seed in range(1 if name == "untuned" else seeds):
            draws_P = 0.8 * hardness_P + 0.2 * generator.random(ITEMS)
            harmful = [float(draw < rate) for draw in draws_P]
            losses_P = (losses or {}).get(name, 2.0) + 0.01 * seed + np.arange(4) + 0.001 * generator.random(4)
            values = {"refused": [1 - each for each in harmful], "loss": losses_P.tolist()}
            norms = None if name == "untuned" else UpdateNorms(update=1.0, robust=0.8, rest=0.6, weights=100.0)
            judged = {"harmful": harmful} if has_judge else {}
            made[name].append(Measured(control=name, seed=seed, values={**judged, **values}, norms=norms))
    return made


BOTH = {"untuned": 0.1, "ordinary": 0.5}


@pytest.mark.parametrize(
    ("mllr", "matched", "said", "answer"),
    [
        (0.1, 0.6, "ML-LR was safer than", "better"),
        (0.6, 0.1, "ML-LR was less safe than", "worse"),
        (0.3, 0.31, "cannot be told here", "unknown"),
    ],
)
@pytest.mark.parametrize("has_judge", [True, False])
def test_three_verdicts(mllr: float, matched: float, said: str, answer: str, has_judge: bool) -> None:
    found = models({**BOTH, "mllr": mllr, "norm-matched": matched}, has_judge=has_judge)
    assert said in verdict(found)
    assert "3 seeds, 60 requests" in verdict(found)
    assert ("judged harmful" in verdict(found)) is has_judge
    assert deciding(found).answer == answer


@pytest.mark.parametrize(
    ("refused", "measure", "sign"), [(0.04, "probe", "worse"), (0.06, "refused", "better")], ids=["nothing to lose", "something"]
)
def test_where_nothing_is_refused_the_probe_decides(refused: float, measure: str, sign: str) -> None:
    found = models({"untuned": 1 - refused, "ordinary": 0.5, "mllr": 0.1, "norm-matched": 0.6}, has_judge=False)
    of_untuned = [1.0] * round(refused * 50) + [0.0] * (50 - round(refused * 50))
    for name, each in found.items():
        for number, model in enumerate(each):
            right = (10 if name == "mllr" else 45) + number
            probe = {"probe": [1.0] * right + [0.0] * (50 - right)}
            own = {"refused": of_untuned} if name == "untuned" else {}
            found[name][number] = replace(model, values={**model.values, **probe, **own})
    assert deciding(found).measure == measure
    assert deciding(found).answer == sign
    said = " ".join(warnings(found, judge="x", is_model=False, harmful_refusals=None))
    assert ("refuses 4% of the harmful requests" in said) == (measure == "probe")
    assert ("50 prompts" in verdict(found)) == (measure == "probe")


def test_without_both_the_question_was_not_asked() -> None:
    assert "was not asked" in verdict(models(BOTH))
    assert deciding(models(BOTH)) is None


def test_one_seed_decides_nothing() -> None:
    found = models({**BOTH, "mllr": 0.0, "norm-matched": 1.0}, seeds=1)
    assert "cannot be told" in verdict(found)
    assert "1 seed," in verdict(found)
    said = " ".join(warnings(found, judge="x", is_model=True, harmful_refusals=0.0))
    assert "1 seed: there are no intervals" in said


LEARNT = {"untuned": 3.0, "ordinary": 2.0, "mllr": 2.5, "score-matched": 2.5}


def test_at_the_same_score_there_is_a_sentence_of_its_own() -> None:
    found = models({**BOTH, "mllr": 0.1, "score-matched": 0.6}, LEARNT)
    assert verdict(found).startswith("ML-LR was safer than the uniform rate of the same task score here")
    both = models({**BOTH, "mllr": 0.1, "norm-matched": 0.1, "score-matched": 0.6}, LEARNT)
    assert "of the same update norm cannot be told here" in verdict(both)
    assert "ML-LR was safer than the uniform rate of the same task score here" in verdict(both)
    said = " ".join(warnings(found, judge="x", is_model=True, harmful_refusals=0.0))
    assert "held-out loss of mllr is not" in said
    assert "score-matched has the score of mllr" in said
    assert "was not matched" not in said


def test_a_score_that_was_not_matched_is_said() -> None:
    found = models({**BOTH, "mllr": 0.1, "score-matched": 0.6}, {**LEARNT, "score-matched": 2.4})
    said = " ".join(warnings(found, judge="x", is_model=True, harmful_refusals=0.0))
    assert "What was learnt was not matched: 1.20 times mllr's with seed 0, 1.2" in said


def test_lines_hold_rates_scores_and_updates() -> None:
    found = models({**BOTH, "mllr": 0.3}, {"mllr": 2.5})
    by_name = {line.control: line for line in lines_of(found)}
    assert by_name["untuned"].update is None
    assert by_name["untuned"].is_equal is None
    assert by_name["mllr"].is_equal is False
    assert by_name["mllr"].update.mean == pytest.approx(0.01)
    expected = np.mean([model.values["harmful"] for model in found["mllr"]])
    assert by_name["mllr"].figures["harmful"].mean == pytest.approx(expected)
    assert by_name["untuned"].figures["harmful"].interval is not None, "over requests"
    assert measures_of(found) == ["harmful", "refused", "loss"]
    score = next(each for each in differences_of(found, "mllr", "ordinary") if each.measure == "loss")
    assert score.answer == "worse", "a larger loss"


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(2.0, True), (2.5, False), (2.02, False)],
    ids=["the same", "far off, though rows differ by more", "within the seeds' interval, though each row is higher"],
)
def test_equal_task_scores_are_told_from_others(loss: float, expected: bool) -> None:
    (_, line) = lines_of(models({"ordinary": 0.5, "mllr": 0.3}, {"mllr": loss}))
    assert line.is_equal is expected


def test_what_must_be_known_is_said() -> None:
    found = models({**BOTH, "mllr": 0.3, "norm-matched": 0.3}, {"mllr": 2.5}, has_judge=False)
    found["norm-matched"][1] = Measured(
        control="norm-matched",
        seed=1,
        values=found["norm-matched"][1].values,
        unjudged=2,
        norms=UpdateNorms(update=1.2, robust=1.0, rest=0.6, weights=100.0),
    )
    said = " ".join(warnings(found, judge="x", is_model=False, harmful_refusals=None))
    for expected in (
        "No judge of harm",
        "no verdict on 2",
        "equal task score: the held-out loss of mllr is not",
        "1.20 times mllr's with seed 1",
    ):
        assert expected in said
    assert "refusals harmful" in " ".join(warnings(found, judge="x", is_model=True, harmful_refusals=0.7))
    quiet = models({**BOTH, "mllr": 0.3, "norm-matched": 0.3})
    assert warnings(quiet, judge="x", is_model=True, harmful_refusals=0.0) == []
