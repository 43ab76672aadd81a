"""The measures, against scikit-learn and by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    matthews_corrcoef,
    recall_score,
    roc_auc_score,
)

from guardtrain.errors import DataError
from guardtrain.evaluate.scores import flip_rate, measure, recall_at_fpr, too_few_benign

# Few distinct values, so that ties are the rule.
rows_strategy = st.lists(st.tuples(st.integers(-5, 5), st.booleans(), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({label for _, label, _ in rows}) == 2
)


def arrays(rows: list[tuple[int, bool, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, labels, parsed = zip(*rows, strict=True)
    return np.array(scores) / 2, np.array(labels), np.array(parsed)


@given(rows=rows_strategy, threshold=st.integers(-6, 6))
def test_measures_equal_scikit_learn(rows: list[tuple[int, bool, bool]], threshold: float) -> None:
    scores_N, labels_N, _ = arrays(rows)
    got = measure(scores_N, labels_N, threshold=threshold)
    flagged_N = scores_N >= threshold
    assert got.auroc == pytest.approx(roc_auc_score(labels_N, scores_N))
    assert got.auprc == pytest.approx(average_precision_score(labels_N, scores_N))
    assert got.f1 == pytest.approx(f1_score(labels_N, flagged_N, zero_division=0))
    assert got.recall == pytest.approx(recall_score(labels_N, flagged_N))
    assert got.false_positive_rate == pytest.approx(flagged_N[~labels_N].mean())
    assert got.flagged == pytest.approx(flagged_N.mean())
    assert got.mcc == pytest.approx(matthews_corrcoef(labels_N, flagged_N))
    assert got.brier == pytest.approx(brier_score_loss(labels_N, 1 / (1 + np.exp(-scores_N))))
    assert got.recall_at_1_fpr == pytest.approx(recall_at_fpr(scores_N, labels_N, 0.01).recall)
    assert got.recall_at_5_fpr == pytest.approx(recall_at_fpr(scores_N, labels_N, 0.05).recall)
    assert (got.rows, got.malicious, got.parse_failures) == (len(rows), labels_N.sum(), 0)


@given(rows=rows_strategy, threshold=st.integers(-6, 6))
def test_a_parse_failure_is_an_error_whatever_its_score(rows: list[tuple[int, bool, bool]], threshold: float) -> None:
    """A malicious row without a verdict was missed, a benign one was flagged for nothing."""
    scores_N, labels_N, parsed_N = arrays(rows)
    got = measure(scores_N, labels_N, threshold=threshold, is_parsed_N=parsed_N)
    answers_N = np.where(parsed_N, scores_N >= threshold, ~labels_N)
    assert got.f1 == pytest.approx(f1_score(labels_N, answers_N, zero_division=0))
    assert got.recall == pytest.approx(recall_score(labels_N, answers_N))
    assert got.false_positive_rate == pytest.approx(answers_N[~labels_N].mean())
    assert got.parse_failures == (~parsed_N).sum()
    assert got.auroc == measure(scores_N, labels_N).auroc


@given(rows=rows_strategy, max_fpr=st.floats(0.01, 0.99))
def test_recall_at_fpr_equals_a_naive_search(rows: list[tuple[int, bool, bool]], max_fpr: float) -> None:
    scores_N, labels_N, _ = arrays(rows)
    point = recall_at_fpr(scores_N, labels_N, max_fpr)
    candidates = [*np.unique(scores_N), math.inf]
    rates = [((scores_N >= t)[labels_N].mean(), (scores_N >= t)[~labels_N].mean()) for t in candidates]
    assert point.recall == pytest.approx(max(recall for recall, fpr in rates if fpr <= max_fpr))
    # The threshold that is saved gives back exactly these rates, and can be written to JSON.
    flagged_N = scores_N >= json.loads(json.dumps(point.threshold))
    assert flagged_N[labels_N].mean() == pytest.approx(point.recall)
    assert flagged_N[~labels_N].mean() == pytest.approx(point.fpr)
    assert point.fpr <= max_fpr
    assert math.isfinite(point.threshold)


def test_by_hand() -> None:
    """Malicious 3 2 2 0 against benign 2 1 -1 -1: they beat 4, 3½, 3½ and 2 of the four."""
    scores_N = np.array([3.0, 2.0, 2.0, 0.0, 2.0, 1.0, -1.0, -1.0])
    labels_N = np.array([True] * 4 + [False] * 4)
    got = measure(scores_N, labels_N, threshold=1.5)
    assert got.auroc == pytest.approx((4 + 3.5 + 3.5 + 2) / 16)
    assert got.recall == 3 / 4
    assert got.false_positive_rate == 1 / 4
    assert got.f1 == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert got.flagged == 4 / 8
    assert got.recall_at_1_fpr == got.recall_at_5_fpr == 1 / 4  # only the 3 stands above every benign score
    point = recall_at_fpr(scores_N, labels_N, 0.25)
    assert (point.threshold, point.recall, point.fpr) == (2.0, 0.75, 0.25)


def test_the_rate_may_be_exactly_the_target() -> None:
    scores_N = np.arange(200.0)
    labels_N = scores_N % 2 == 0
    for percent in range(1, 30):
        assert recall_at_fpr(scores_N, labels_N, percent / 100).fpr == percent / 100


def test_ties_move_together() -> None:
    """All scores alike: flagging one flags all, so nothing is flagged at a small rate."""
    scores_N, labels_N = np.zeros(10), np.arange(10) < 5
    point = recall_at_fpr(scores_N, labels_N, 0.5)
    assert (point.recall, point.fpr) == (0.0, 0.0)
    assert point.threshold > 0
    assert measure(scores_N, labels_N).auroc == 0.5


def test_a_score_at_the_threshold_is_flagged() -> None:
    assert measure(np.array([0.0, -1.0]), np.array([True, False])).recall == 1.0


@pytest.mark.parametrize(
    ("labels", "found"), [([True, True], "only malicious rows"), ([False, False], "only benign rows"), ([], "none")]
)
def test_a_threshold_needs_both_classes(labels: list[bool], found: str) -> None:
    with pytest.raises(DataError, match=found):
        recall_at_fpr(np.zeros(len(labels)), np.array(labels, dtype=bool), 0.01)


def test_of_one_class_there_are_its_own_rates_only() -> None:
    scores_N = np.array([2.0, 1.0, -1.0, -2.0])
    benign = measure(scores_N, np.zeros(4, dtype=bool), threshold=1.5)
    assert (benign.false_positive_rate, benign.flagged, benign.benign) == (0.25, 0.25, 4)
    malicious = measure(scores_N, np.ones(4, dtype=bool), threshold=-1.0)
    assert (malicious.recall, malicious.flagged, malicious.benign) == (0.75, 0.75, 0)
    for one_class in (benign, malicious):
        assert [one_class.auroc, one_class.auprc, one_class.f1, one_class.mcc] == [None] * 4
        assert one_class.recall_at_1_fpr is one_class.recall_at_5_fpr is None
    assert benign.recall is malicious.false_positive_rate is None


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="found none"):
        measure(np.array([]), np.array([], dtype=bool))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"not a number.*found 1 others"):
        measure(np.array([0.0, 1.0, value]), np.array([True, False, True]))
    with pytest.raises(DataError, match=r"not a number.*found 1 others"):
        measure(np.array([0.0, math.nan, math.inf]), np.array([True, False, True]), is_parsed_N=np.array([True, False, False]))


@given(rows=rows_strategy, threshold=st.integers(-6, 6))
def test_a_row_without_a_score_is_wrong_in_every_measure(rows: list[tuple[int, bool, bool]], threshold: float) -> None:
    """No input makes an answer that cannot be read count as benign, nor as malicious."""
    scores_N, labels_N, parsed_N = arrays(rows)
    got = measure(np.where(parsed_N, scores_N, np.nan), labels_N, threshold=threshold, is_parsed_N=parsed_N)
    worst_N = np.where(parsed_N, scores_N, np.where(labels_N, -100.0, 100.0) - np.arange(len(rows)) / 100)
    worst = measure(worst_N, labels_N, threshold=threshold)
    for key in ("auroc", "auprc", "f1", "mcc", "recall", "false_positive_rate", "flagged", "recall_at_1_fpr", "recall_at_5_fpr"):
        assert getattr(got, key) == pytest.approx(getattr(worst, key)), key
    assert got.brier == pytest.approx(worst.brier)
    assert got.parse_failures == (~parsed_N).sum()


@given(rows=rows_strategy, threshold=st.integers(-6, 6), spoilt=st.integers(0, 59))
def test_losing_a_verdict_never_helps(rows: list[tuple[int, bool, bool]], threshold: float, spoilt: int) -> None:
    """Whatever the row's class and score: no figure gets better.

    But where scores are tied: average precision takes tied rows at the place of the last, and a lost verdict unties them.
    """
    scores_N, labels_N, parsed_N = arrays(rows)
    scores_N = scores_N + np.arange(len(rows)) / 1000
    fewer_N = parsed_N & (np.arange(len(rows)) != spoilt % len(rows))
    before, after = (
        measure(np.where(each, scores_N, np.nan), labels_N, threshold=threshold, is_parsed_N=each) for each in (parsed_N, fewer_N)
    )
    for key in ("auroc", "auprc", "f1", "mcc", "recall", "recall_at_1_fpr", "recall_at_5_fpr"):
        assert getattr(after, key) <= getattr(before, key) + 1e-12, key
    assert after.false_positive_rate >= before.false_positive_rate
    assert after.brier >= before.brier - 1e-12


def test_the_calibration_error_by_hand() -> None:
    """Two bins: three rows at 0.9, of which two are malicious; one at 0.1 that is benign."""
    p_N, labels_N = np.array([0.9, 0.9, 0.9, 0.1]), np.array([True, True, False, False])
    got = measure(np.zeros(4), labels_N, p_malicious_N=p_N)
    assert got.ece == pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.1)
    assert got.brier == pytest.approx((0.1**2 + 0.1**2 + 0.9**2 + 0.1**2) / 4)
    sure = measure(np.zeros(2), np.array([True, False]), p_malicious_N=np.array([1.0, 0.0]))
    assert sure.ece == sure.brier == 0


@pytest.mark.parametrize(
    ("benign", "fpr", "expected"),
    [
        (299, 0.01, "recall at 1 % FPR rests on 2 false alarms: 299 benign rows, 300 are needed"),
        (99, 0.01, "allows no false alarm at all"),
        (300, 0.01, None),
        (60, 0.05, None),
        (59, 0.05, "rests on 2 false alarms"),
        (0, 0.01, None),
    ],
)
def test_too_few_benign_rows_are_said(benign: int, fpr: float, expected: str | None) -> None:
    said = too_few_benign(benign, fpr)
    assert said is None if expected is None else expected in str(said)


def test_a_row_flips_when_its_samples_disagree() -> None:
    flags_NS = np.array([[True, True, True], [False, False, False], [True, False, True], [False, False, True]])
    assert flip_rate(flags_NS) == 0.5
    assert flip_rate(flags_NS[:, :1]) == 0


def test_figures_are_plain_and_rounded() -> None:
    figures = measure(np.array([1.0, 0.0, 2.0, -3.0]), np.array([True, False, False, True])).to_json()
    assert json.loads(json.dumps(figures)) == figures
    assert figures["recall"] == 0.5
    thirds = measure(np.array([1.0, 0.0, -1.0, -2.0]), np.array([True, True, True, False]), threshold=0.5).to_json()
    assert thirds["recall"] == 0.333333
