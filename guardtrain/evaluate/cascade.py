"""Choose the band of a cascade on calibration rows.

Pure. Shape suffix: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from guardtrain.errors import DataError
from guardtrain.evaluate.scores import recall_at_fpr
from guardtrain.inference.cascade import Cascade


def choose_cascade(
    off_N: np.ndarray,
    both_N: np.ndarray,
    is_malicious_N: np.ndarray,
    thresholds: Mapping[str, float],
    *,
    target_fpr: float,
    max_lost: float = 0.01,
) -> Cascade:
    """The band for calibration rows: what must be escalated so that the cascade keeps what mode `both` promises.

    low: the highest score below which at most `max_lost` of all malicious rows would be lost by stopping early: rows that mode
        `both` catches at its threshold. Rows that it misses too are no loss.
    high: mode `off` may spend half of `target_fpr`, the rest is for escalated rows; raised further until false alarms of clear
        and escalated rows together are at most the rate, which they are at the latest where nothing is clear.
    The band holds the threshold of mode `off`, so no row is clear against its verdict; without width it escalates nothing.

    off_N, both_N: float; is_malicious_N: bool; thresholds: of `off` and `both`, chosen at target_fpr on the same rows.
    Raises DataError when a class is absent, or where mode `both` alone exceeds the rate.
    """
    off_N, both_N = np.asarray(off_N, dtype=np.float64), np.asarray(both_N, dtype=np.float64)
    is_malicious_N = np.asarray(is_malicious_N, dtype=bool)
    high = max(recall_at_fpr(off_N, is_malicious_N, target_fpr / 2).threshold, thresholds["off"])
    is_caught_N = both_N >= thresholds["both"]
    low = _low(off_N[is_malicious_N & is_caught_N], math.floor(max_lost * is_malicious_N.sum()), thresholds["off"])
    is_benign_N = ~is_malicious_N
    return Cascade(low, _high(off_N[is_benign_N], is_caught_N[is_benign_N], low, high, target_fpr))


def _low(caught: np.ndarray, allowed: int, ceiling: float) -> float:
    """The highest bound, at most `ceiling`, that leaves at most `allowed` of the caught rows below it."""
    return min(float(np.sort(caught)[allowed]), ceiling) if len(caught) > allowed else ceiling


def _high(off_N: np.ndarray, is_flagged_N: np.ndarray, low: float, high: float, target_fpr: float) -> float:
    """The lowest bound from `high` on at which benign rows alone keep to the rate. is_flagged_N: by mode `both`."""
    candidates = [high, *np.unique(off_N[off_N >= high]).tolist(), float(np.nextafter(max(high, off_N.max()), np.inf))]
    for candidate in candidates:
        is_alarm_N = (off_N >= candidate) | ((off_N >= low) & is_flagged_N)
        if is_alarm_N.mean() <= target_fpr:
            return float(candidate)
    found = f"{is_flagged_N.mean():.4f} of benign rows flagged"
    raise DataError("mode both exceeds the rate that the cascade must keep", expected=f"at most {target_fpr}", found=found)
