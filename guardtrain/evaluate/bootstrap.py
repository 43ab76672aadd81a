"""How sure a figure is: bootstrap intervals, and two guards compared on the same rows.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 (percentile intervals) and 16 (tests). Rows are drawn
with replacement within their class, so that no sample lacks one and rates keep their denominators.
Shape suffixes: N rows, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import binomtest

from guardtrain.errors import DataError
from guardtrain.evaluate.scores import Interval, Judged, Measures, measures_of, weighted_measures

SAMPLES = 1000
CONFIDENCE = 0.95
_NUMBERS_AT_ONCE = 2**22  # bounds memory, whatever the number of rows


@dataclass(frozen=True, slots=True)
class Difference:
    """One measure of a guard minus that of another on the same rows.

    interval: 95 % of paired bootstrap samples. p_value: two-sided, of the differences being centred on zero.
    """

    value: float
    interval: Interval
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Plain data, rounded to six digits."""
        return {**asdict(self), "value": round(self.value, 6), "interval": [round(end, 6) for end in self.interval]}


def with_intervals(judged: Judged, samples: int = SAMPLES, seed: int = 0) -> Measures:
    """The measures of a set with their 95 % intervals; the same for the same seed.

    The calibration error has none: a resample repeats rows, which makes the bins less even than they are, so that its bootstrap
    lies above the figure itself.
    """
    drawn = [weighted_measures(judged, weights_BN) for weights_BN in resamples(judged.is_malicious_N, samples, seed)]
    figures = {key: np.concatenate([part[key] for part in drawn]) for key in drawn[0]}
    known = {key: values_B for key, values_B in figures.items() if key != "ece" and not np.isnan(values_B).any()}
    intervals = {key: interval_of(values_B) for key, values_B in known.items()}
    return replace(measures_of(judged), intervals=intervals)


def rate_interval(count: int, of: int) -> Interval:
    """The 95 % interval of Wilson (1927) for `count` of `of` rows, at least one; it also holds for few rows and for 0 and 1."""
    interval = binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def compare(one: Judged, other: Judged, samples: int = SAMPLES, seed: int = 0) -> dict[str, Difference]:
    """`one` minus `other` in every measure that the set allows. Raises DataError unless their rows have the same labels."""
    if not np.array_equal(one.is_malicious_N, other.is_malicious_N):
        found = f"{len(one.scores_N)} and {len(other.scores_N)} rows, or other labels"
        raise DataError("guards are compared on the same rows", expected="one set in one order", found=found)
    ones_1N = np.ones((1, len(one.scores_N)))
    values = _differences(one, other, ones_1N)
    drawn = [_differences(one, other, weights_BN) for weights_BN in resamples(one.is_malicious_N, samples, seed)]
    result = {}
    for key, (value,) in values.items():
        differences_B = np.concatenate([part[key] for part in drawn])
        if not np.isnan(differences_B).any():
            result[key] = Difference(float(value), interval_of(differences_B), _p_value(differences_B))
    return result


def _differences(one: Judged, other: Judged, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
    minuend, subtrahend = weighted_measures(one, weights_BN), weighted_measures(other, weights_BN)
    return {key: minuend[key] - subtrahend[key] for key in minuend}


def resamples(is_malicious_N: np.ndarray, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row was drawn, shape (B, N), as many samples at once as memory allows."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // len(is_malicious_N))
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        weights_BN = np.zeros((count, len(is_malicious_N)))
        for rows in (np.flatnonzero(is_malicious_N), np.flatnonzero(~is_malicious_N)):
            if len(rows):
                weights_BN[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=count)
        yield weights_BN


def interval_of(values_B: np.ndarray) -> Interval:
    """The middle 95 % of bootstrap samples."""
    low, high = np.quantile(values_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _p_value(differences_B: np.ndarray) -> float:
    """Twice the share of samples on the other side of zero, ties counted on both; never 0, for samples are finite."""
    smaller = min((differences_B <= 0).sum(), (differences_B >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(differences_B) + 1)))
