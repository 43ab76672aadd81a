"""What a measure is over seeds and items (prompts, rows), how sure it is, and what can be told from a difference. Pure.

Seeds and items are crossed: every seed's model saw every item, and both are draws from more of their kind. The half-widths of
Student's interval over the seeds' means and of that over the items' means are added in quadrature, as for a sum of independent
parts (Zou and Donner, 2008, MOVER). What belongs to neither counts twice, which errs to the wide side. Satterthwaite's degrees of
freedom for the summed variance cover too little with three seeds (92 % where it should be 95): what three seeds say of their own
variance is itself unsure. Of one item it is Student's interval over seeds.
Shape suffixes: S seeds, P items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.95
Answer = Literal["better", "worse", "unknown"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval, None where there is nothing to estimate it from (one seed)."""

    mean: float
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Plain data, rounded to six digits."""
        return {"mean": round(self.mean, 6), "interval": [round(end, 6) for end in self.interval] if self.interval else None}


def estimate(values_SP: np.ndarray, *, has_seeds: bool = True) -> Estimate:
    """The grand mean and its interval. has_seeds: False where all seeds are one model, which was not trained."""
    seeds, items = values_SP.shape
    mean = float(values_SP.mean())
    if has_seeds and seeds < 2:
        return Estimate(mean, None)
    of_seeds = _half_width(values_SP.mean(1)) if has_seeds else 0.0
    of_items = _half_width(values_SP.mean(0)) if items > 1 else 0.0
    half = math.hypot(of_seeds, of_items)
    return Estimate(mean, (mean - half, mean + half))


def rate(values_SP: np.ndarray, *, has_seeds: bool = True) -> Estimate:
    """`estimate` of shares in [0, 1]. Where every value is the same the interval is Wilson's for one seed's items."""
    from scipy.stats import binomtest

    found = estimate(values_SP, has_seeds=has_seeds)
    if found.interval is None:
        return found
    if np.ptp(values_SP) == 0 and found.mean in (0.0, 1.0):
        items = values_SP.shape[1]
        wilson = binomtest(round(found.mean * items), items).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(found.mean, (float(wilson.low), float(wilson.high)))
    low, high = found.interval
    return Estimate(found.mean, (max(0.0, low), min(1.0, high)))


def difference(one_SP: np.ndarray, other_SP: np.ndarray) -> Estimate:
    """`one` minus `other`, paired by seed and item."""
    return estimate(one_SP - other_SP)


def answer(found: Estimate, *, larger_is_better: bool) -> Answer:
    """What a difference says: its whole interval must lie on one side of zero."""
    if found.interval is None:
        return "unknown"
    low, high = found.interval if larger_is_better else (-found.interval[1], -found.interval[0])
    return "better" if low > 0 else "worse" if high < 0 else "unknown"


def is_equal(score: Estimate, reference: Estimate) -> bool | None:
    """Whether a task score is the reference's: its mean lies in the reference's interval. None where there is no interval."""
    if reference.interval is None:
        return None
    return reference.interval[0] <= score.mean <= reference.interval[1]


def next_factor(tried: list[tuple[float, float]], target: float) -> float:
    """The rate factor to try next to reach `target`, by the secant through the two nearest tries, in logarithms.

    tried: (factor, what it reached: an update norm, or a loss that was learnt), at least one, all above 0. With one, or where a
    secant says nothing, what is reached is taken to be proportional to the rate.
    """
    nearest = sorted(tried, key=lambda each: abs(math.log(each[1] / target)))[:2]
    (factor, reached), slope = nearest[0], 1.0
    if len(nearest) == 2 and nearest[1][0] != factor:
        found = math.log(nearest[1][1] / reached) / math.log(nearest[1][0] / factor)
        slope = found if 0.2 <= found <= 5 else 1.0
    return factor * math.pow(target / reached, 1 / slope)


def _half_width(means: np.ndarray) -> float:
    """Of Student's interval around the mean of at least two numbers."""
    from scipy.stats import t

    if np.ptp(means) <= 1e-12 * max(1.0, float(np.abs(means).max())):
        return 0.0  # means of equal numbers differ by rounding, which is no reason to tell them apart
    return float(t.ppf((1 + CONFIDENCE) / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means)))
