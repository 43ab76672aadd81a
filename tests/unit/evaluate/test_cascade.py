"""The cascade's band keeps what mode `both` promises, and its margins rank rows of two modes together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardtrain.errors import ConfigError, DataError
from guardtrain.evaluate.cascade import choose_cascade
from guardtrain.evaluate.scores import recall_at_fpr
from guardtrain.inference.cascade import Cascade, margins

# Few distinct values, so that ties are the rule.
rows_strategy = st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6), st.booleans()), min_size=2, max_size=80).filter(
    lambda rows: len({label for _, _, label in rows}) == 2
)


def arrays(rows: list[tuple[int, int, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    off, both, labels = zip(*rows, strict=True)
    return np.array(off) / 2, np.array(both) / 2, np.array(labels)


def thresholds_of(off_N: np.ndarray, both_N: np.ndarray, labels_N: np.ndarray, rate: float) -> dict[str, float]:
    return {mode: recall_at_fpr(s, labels_N, rate).threshold for mode, s in (("off", off_N), ("both", both_N))}


@given(rows=rows_strategy, rate=st.sampled_from([0.02, 0.1, 0.3]), lost=st.sampled_from([0.0, 0.05, 0.3]))
def test_a_chosen_band_keeps_rate_and_recall(rows: list[tuple[int, int, bool]], rate: float, lost: float) -> None:
    off_N, both_N, labels_N = arrays(rows)
    thresholds = thresholds_of(off_N, both_N, labels_N, rate)
    cascade = choose_cascade(off_N, both_N, labels_N, thresholds, target_fpr=rate, max_lost=lost)
    flagged_N = margins(off_N, both_N, cascade, thresholds) >= 0
    assert flagged_N[~labels_N].mean() <= rate
    by_both_N = both_N >= thresholds["both"]
    lost_N = labels_N & by_both_N & ~flagged_N
    assert lost_N.sum() <= lost * labels_N.sum()
    assert cascade.low <= thresholds["off"] <= cascade.high
    is_clear_N = np.array([not cascade.escalates(score) for score in off_N])
    assert (flagged_N == (off_N >= thresholds["off"]))[is_clear_N].all()


@given(rows=rows_strategy, rate=st.sampled_from([0.1, 0.3]))
def test_the_band_is_no_wider_than_it_must_be(rows: list[tuple[int, int, bool]], rate: float) -> None:
    """The next higher `low` would lose too many rows, and any lower `high` from mode off's own bound on too many false alarms."""
    off_N, both_N, labels_N = arrays(rows)
    thresholds = thresholds_of(off_N, both_N, labels_N, rate)
    cascade = choose_cascade(off_N, both_N, labels_N, thresholds, target_fpr=rate, max_lost=0.1)
    caught_N = labels_N & (both_N >= thresholds["both"])
    for low in np.unique(off_N[(off_N > cascade.low) & (off_N <= thresholds["off"])]):
        assert (caught_N & (off_N < low)).sum() > math.floor(0.1 * labels_N.sum())
    start = max(thresholds["off"], recall_at_fpr(off_N, labels_N, rate / 2).threshold)
    for high in np.unique(off_N[(off_N >= start) & (off_N < cascade.high)]):
        flagged_N = margins(off_N, both_N, Cascade(cascade.low, float(high)), thresholds) >= 0
        assert flagged_N[~labels_N].mean() > rate


def test_perfect_scores_escalate_nothing() -> None:
    off_N = np.array([-3.0, -2.0, 2.0, 3.0])
    labels_N = off_N > 0
    thresholds = thresholds_of(off_N, off_N, labels_N, 0.01)
    cascade = choose_cascade(off_N, off_N, labels_N, thresholds, target_fpr=0.01)
    assert cascade.low == cascade.high == 2.0
    assert not any(map(cascade.escalates, off_N))


def test_by_hand() -> None:
    """Rows between -1 and 4 are escalated: both catches the malicious one at -1, and the benign 3 would be a false alarm."""
    off_N = np.array([-4.0, -1.0, 5.0, 6.0, -5.0, -2.0, 1.0, 3.0])
    both_N = np.array([-9.0, 2.0, 5.0, 6.0, -5.0, -5.0, -5.0, 0.0])
    labels_N = np.array([True] * 4 + [False] * 4)
    cascade = choose_cascade(off_N, both_N, labels_N, {"off": 3.0, "both": 1.0}, target_fpr=0.25)
    assert (cascade.low, cascade.high) == (-1.0, 5.0)
    got = margins(off_N, np.where([cascade.escalates(s) for s in off_N], both_N, np.nan), cascade, {"off": 3.0, "both": 1.0})
    assert got.tolist() == [-7.0, 1.0, 2.0, 3.0, -8.0, -5.0, -6.0, -1.0]


def test_a_band_beside_the_threshold_decides_itself() -> None:
    """Thresholds may be set anew; what the band calls clear stays so."""
    cascade, thresholds = Cascade(0.0, 1.0), {"off": 5.0, "both": 0.0}
    assert (margins(np.array([2.0, -1.0]), np.full(2, np.nan), cascade, thresholds) >= 0).tolist() == [True, False]


def test_the_edges_of_a_band() -> None:
    cascade = Cascade(-1.0, 1.0)
    assert [cascade.escalates(score) for score in (-1.1, -1.0, 0.9, 1.0)] == [False, True, True, False]
    assert cascade.to_json() == {"low": -1.0, "high": 1.0}


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 0.0), (0.0, math.inf)])
def test_what_is_no_band_is_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="not a band"):
        Cascade(low, high)


def test_a_threshold_beyond_the_rate_is_refused() -> None:
    labels_N = np.array([True, False, False])
    with pytest.raises(DataError, match="mode both exceeds the rate"):
        choose_cascade(np.zeros(3), np.ones(3), labels_N, {"off": 0.0, "both": 0.0}, target_fpr=0.1)
