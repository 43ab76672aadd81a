"""Intervals cover what they claim to, and two guards are told apart when they differ and only then."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from guardtrain.errors import DataError
from guardtrain.evaluate import bootstrap
from guardtrain.evaluate.bootstrap import compare, resamples, with_intervals
from guardtrain.evaluate.scores import Judged, measures_of, weighted_measures


def drawn(seed: int, rows: int = 200, shift: float = 1.0) -> Judged:
    rng = np.random.default_rng(seed)
    is_malicious_N = np.arange(rows) % 2 == 0
    return Judged(scores_N=rng.normal(shift * is_malicious_N, 1.0), is_malicious_N=is_malicious_N, threshold=0.5)


def test_weights_are_repeated_rows() -> None:
    judged = drawn(0, rows=30)
    (weights_BN,) = resamples(judged.is_malicious_N, 5, seed=1)
    figures = weighted_measures(judged, weights_BN)
    for number, weights_N in enumerate(weights_BN.astype(int)):
        rows = np.repeat(np.arange(30), weights_N)
        literal = measures_of(Judged(scores_N=judged.scores_N[rows], is_malicious_N=judged.is_malicious_N[rows], threshold=0.5))
        for key, values_B in figures.items():
            assert values_B[number] == pytest.approx(getattr(literal, key)), key


def test_a_resample_keeps_the_size_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    is_malicious_N = np.arange(50) < 7
    parts = list(resamples(is_malicious_N, 40, seed=2))
    whole_BN = np.concatenate(parts)
    assert whole_BN.shape == (40, 50)
    assert (whole_BN @ is_malicious_N == 7).all()
    assert (whole_BN.sum(axis=1) == 50).all()
    assert len({tuple(row) for row in whole_BN}) == 40
    monkeypatch.setattr(bootstrap, "_NUMBERS_AT_ONCE", 100)
    assert [len(part) for part in resamples(is_malicious_N, 5, seed=2)] == [2, 2, 1]


def test_the_interval_of_a_rate_is_the_binomial_one() -> None:
    """300 benign rows of which 30 are flagged: 0.1 ± 1.96 · sqrt(0.1 · 0.9 / 300)."""
    scores_N = np.concatenate([np.ones(30), -np.ones(270), np.ones(10)])
    judged = Judged(scores_N=scores_N, is_malicious_N=np.arange(310) >= 300)
    low, high = with_intervals(judged, samples=4000).intervals["false_positive_rate"]
    half = 1.96 * np.sqrt(0.1 * 0.9 / 300)
    assert (low, high) == (pytest.approx(0.1 - half, abs=0.006), pytest.approx(0.1 + half, abs=0.006))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """AUROC of two normals a standard deviation apart is 0.7602."""
    covered = []
    for seed in range(120):
        low, high = with_intervals(drawn(seed), samples=200, seed=seed).intervals["auroc"]
        covered.append(low <= 0.7602 <= high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_the_figures_are_those_without_intervals_and_the_draw_is_seeded() -> None:
    judged = drawn(4)
    one, again, other = (with_intervals(judged, samples=50, seed=seed) for seed in (0, 0, 1))
    assert dataclasses.replace(one, intervals={}) == measures_of(judged)
    assert one == again
    assert one.intervals != other.intervals
    assert json.loads(json.dumps(one.to_json()))["intervals"]["auroc"] == [round(end, 6) for end in one.intervals["auroc"]]


def test_of_one_class_there_are_intervals_for_its_own_rates() -> None:
    benign = Judged(scores_N=np.arange(20.0), is_malicious_N=np.zeros(20, dtype=bool), threshold=10.0)
    assert {"false_positive_rate", "flagged"} <= with_intervals(benign, samples=20).intervals.keys()
    assert not {"auroc", "recall"} & with_intervals(benign, samples=20).intervals.keys()


def test_the_calibration_error_has_no_interval() -> None:
    """Its bootstrap is biased upwards; Brier's score has one, which holds the figure."""
    measures = with_intervals(drawn(7), samples=50)
    assert "ece" not in measures.intervals
    low, high = measures.intervals["brier"]
    assert low < measures.brier < high


def test_a_pair_is_told_apart_by_what_they_differ_in() -> None:
    """The same noise in both: unpaired intervals would overlap by far, the paired one does not hold zero."""
    one = drawn(5, rows=400)
    better = dataclasses.replace(one, scores_N=one.scores_N + 0.4 * one.is_malicious_N)
    found = compare(better, one, samples=400)["auroc"]
    assert found.value == pytest.approx(float(measures_of(better).auroc or 0) - float(measures_of(one).auroc or 0))
    assert 0 < found.interval[0] < found.value < found.interval[1]
    assert found.p_value < 0.01
    alone = with_intervals(one, samples=400).intervals["auroc"]
    assert alone[1] > with_intervals(better, samples=400).intervals["auroc"][0]
    turned = compare(one, better, samples=400)["auroc"]
    assert turned.value == -found.value
    assert turned.p_value == found.p_value


def test_a_guard_does_not_differ_from_itself() -> None:
    same = compare(drawn(6), drawn(6), samples=50)
    assert all((each.value, each.p_value) == (0.0, 1.0) for each in same.values())
    assert "auroc" in same


def test_other_rows_are_not_compared() -> None:
    with pytest.raises(DataError, match="same rows"):
        compare(drawn(0), drawn(0, rows=100))
