"""Pure measures of scores against labels. Shape suffixes: N rows, B bootstrap samples, K distinct scores.

Every measure is a function of row weights, of shape (B, N): all ones give the figure itself, the counts of a resample one draw
of its distribution. So a figure and its interval come from the same lines, which tests compare with scikit-learn.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from guardtrain.errors import DataError

Interval = tuple[float, float]

CALIBRATION_BINS = 15
NEED_BOTH_CLASSES = ("auroc", "auprc", "f1", "mcc", "recall_at_1_fpr", "recall_at_5_fpr")
# No threshold of a false-positive rate r can be told from one of 0 on fewer benign rows than 3 / r: the rule of three
# (Hanley and Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 1983).
RULE_OF_THREE = 3


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold (flag when score >= threshold) and what it gives."""

    threshold: float
    recall: float
    fpr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """How one mode of a guard did on one set. Rates are fractions; None where the set lacks the class that a measure needs.

    threshold: the frozen one, at which f1, mcc, recall, false_positive_rate and flagged are taken.
    ece, brier: of p_malicious. parse_failures: rows on which a free-running guard would have given no verdict; they count as
    errors at the threshold, whatever their score.
    intervals: by measure, 95 % of bootstrap samples; empty when none were drawn.
    """

    rows: int
    malicious: int
    threshold: float
    auroc: float | None
    auprc: float | None
    f1: float | None
    mcc: float | None
    recall: float | None
    false_positive_rate: float | None
    flagged: float
    recall_at_1_fpr: float | None
    recall_at_5_fpr: float | None
    ece: float
    brier: float
    parse_failures: int
    intervals: dict[str, Interval] = field(default_factory=dict)

    @property
    def benign(self) -> int:
        """Rows of the other class."""
        return self.rows - self.malicious

    def to_json(self) -> dict[str, Any]:
        """Plain data, rounded to six digits."""
        tree = {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return {**tree, "intervals": {key: [round(end, 6) for end in ends] for key, ends in self.intervals.items()}}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The rows of one set as one mode of a guard judged them; arrays of shape (N,).

    scores_N: higher means more malicious; NaN for a row that has none, which must be one that was not parsed: in rankings it
    takes the worst place of its class. p_malicious_N: None for the uncalibrated sigmoid of the score.
    """

    scores_N: np.ndarray
    is_malicious_N: np.ndarray
    threshold: float = 0.0
    is_parsed_N: np.ndarray | None = None
    p_malicious_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        scores_N = np.asarray(self.scores_N, dtype=np.float64)
        is_malicious_N = np.asarray(self.is_malicious_N, dtype=bool)
        is_parsed_N = np.ones_like(is_malicious_N) if self.is_parsed_N is None else np.asarray(self.is_parsed_N, dtype=bool)
        bad = ~np.isfinite(scores_N) & (is_parsed_N | ~np.isnan(scores_N))
        if bad.any():
            raise DataError("a score is not a number", expected="finite scores", found=f"{bad.sum()} others")
        if not len(scores_N):
            raise DataError("nothing to measure", expected="rows", found="none")
        object.__setattr__(self, "scores_N", scores_N)
        object.__setattr__(self, "is_malicious_N", is_malicious_N)
        object.__setattr__(self, "is_parsed_N", is_parsed_N)

    @cached_property
    def ranks_N(self) -> np.ndarray:
        """Scores; the missing ones of malicious rows below all others and the threshold, those of benign rows above.

        No two of these are tied: the average precision of tied rows would be that of the last one.
        """
        is_missing_N = np.isnan(self.scores_N)
        known_N = np.append(self.scores_N[~is_missing_N], self.threshold)
        distance_N = 1.0 + np.arange(len(self.scores_N))
        worst_N = np.where(self.is_malicious_N, known_N.min() - distance_N, known_N.max() + distance_N)
        return np.where(is_missing_N, worst_N, self.scores_N)

    @cached_property
    def is_flagged_N(self) -> np.ndarray:
        """By score alone."""
        return self.ranks_N >= self.threshold

    @cached_property
    def is_correct_N(self) -> np.ndarray:
        """At the threshold; a row that was not parsed is wrong."""
        is_correct_N: np.ndarray = (self.is_flagged_N == self.is_malicious_N) & self.is_parsed_N
        return is_correct_N

    @cached_property
    def probabilities_N(self) -> np.ndarray:
        """p_malicious; of a row without a score the wrong certainty."""
        given_N = sigmoid(self.scores_N) if self.p_malicious_N is None else np.asarray(self.p_malicious_N, dtype=np.float64)
        return np.where(np.isnan(self.scores_N), ~self.is_malicious_N, given_N)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


def measure(
    scores_N: np.ndarray,
    is_malicious_N: np.ndarray,
    *,
    threshold: float = 0.0,
    is_parsed_N: np.ndarray | None = None,
    p_malicious_N: np.ndarray | None = None,
) -> Measures:
    """All measures of one mode on one set, as in `Judged`. Raises DataError for no rows, or a score that is not finite."""
    return measures_of(
        Judged(
            scores_N=scores_N,
            is_malicious_N=is_malicious_N,
            threshold=threshold,
            is_parsed_N=is_parsed_N,
            p_malicious_N=p_malicious_N,
        )
    )


def measures_of(judged: Judged) -> Measures:
    """The measures without intervals; see `bootstrap.with_intervals`."""
    figures = weighted_measures(judged, np.ones((1, len(judged.scores_N))))
    assert judged.is_parsed_N is not None
    return Measures(
        rows=len(judged.scores_N),
        malicious=int(judged.is_malicious_N.sum()),
        threshold=float(judged.threshold),
        parse_failures=int((~judged.is_parsed_N).sum()),
        **{key: None if math.isnan(value_B[0]) else float(value_B[0]) for key, value_B in figures.items()},  # type: ignore[arg-type]
    )


def weighted_measures(judged: Judged, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure under each of B weightings of the rows, shape (B,) each; NaN where a class is missing."""
    positive_B = weights_BN @ judged.is_malicious_N
    negative_B = weights_BN @ ~judged.is_malicious_N
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {**_ranking(judged, weights_BN), **_decisions(judged, weights_BN), **_probabilities(judged, weights_BN)}
    is_lone_B = (positive_B == 0) | (negative_B == 0)
    return {key: np.where(is_lone_B, np.nan, value_B) if key in NEED_BOTH_CLASSES else value_B for key, value_B in found.items()}


def _ranking(judged: Judged, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
    """Areas and recalls along the curve of all thresholds; rows of one score move together."""
    order_N = np.argsort(-judged.ranks_N, kind="stable")
    ranks_N = judged.ranks_N[order_N]
    ends_K = np.flatnonzero(np.append(ranks_N[1:] != ranks_N[:-1], True))
    sorted_BN, is_malicious_N = weights_BN[:, order_N], judged.is_malicious_N[order_N]
    hits_BK = np.cumsum(sorted_BN * is_malicious_N, axis=1)[:, ends_K]
    alarms_BK = np.cumsum(sorted_BN * ~is_malicious_N, axis=1)[:, ends_K]
    recall_BK, fpr_BK = hits_BK / hits_BK[:, -1:], alarms_BK / alarms_BK[:, -1:]
    precision_BK = np.nan_to_num(hits_BK / (hits_BK + alarms_BK))  # a resample may begin with rows that it did not draw
    left_BK = np.pad(recall_BK, ((0, 0), (1, 0)))[:, :-1]
    return {
        "auroc": (np.diff(fpr_BK, axis=1, prepend=0) * (recall_BK + left_BK) / 2).sum(axis=1),
        "auprc": ((recall_BK - left_BK) * precision_BK).sum(axis=1),
        "recall_at_1_fpr": np.where(fpr_BK <= 0.01, recall_BK, 0).max(axis=1),
        "recall_at_5_fpr": np.where(fpr_BK <= 0.05, recall_BK, 0).max(axis=1),
    }


def _decisions(judged: Judged, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
    """At the frozen threshold."""
    is_malicious_N, is_correct_N = judged.is_malicious_N, judged.is_correct_N
    hits_B, misses_B = weights_BN @ (is_correct_N & is_malicious_N), weights_BN @ (~is_correct_N & is_malicious_N)
    passes_B, alarms_B = weights_BN @ (is_correct_N & ~is_malicious_N), weights_BN @ (~is_correct_N & ~is_malicious_N)
    product_B = (hits_B + alarms_B) * (hits_B + misses_B) * (passes_B + alarms_B) * (passes_B + misses_B)
    return {
        "f1": 2 * hits_B / (2 * hits_B + misses_B + alarms_B),
        # One answer for every row says nothing: 0, as in scikit-learn.
        "mcc": np.where(product_B == 0, 0.0, (hits_B * passes_B - alarms_B * misses_B) / np.sqrt(product_B)),
        "recall": hits_B / (hits_B + misses_B),
        "false_positive_rate": alarms_B / (passes_B + alarms_B),
        "flagged": weights_BN @ judged.is_flagged_N / weights_BN.sum(axis=1),
    }


def _probabilities(judged: Judged, weights_BN: np.ndarray) -> dict[str, np.ndarray]:
    """Brier's score, and the expected calibration error in bins of equal width (Guo et al., arXiv 1706.04599)."""
    total_B = weights_BN.sum(axis=1)
    gap_N = judged.is_malicious_N - judged.probabilities_N
    in_bin_NM = np.eye(CALIBRATION_BINS)[calibration_bin(judged.probabilities_N)]
    return {
        "ece": np.abs((weights_BN * gap_N) @ in_bin_NM).sum(axis=1) / total_B,
        "brier": weights_BN @ gap_N**2 / total_B,
    }


def calibration_bin(probabilities_N: np.ndarray) -> np.ndarray:
    """Which of the bins of equal width each probability is in, shape (N,)."""
    bins_N: np.ndarray = np.minimum((probabilities_N * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return bins_N


def recall_at_fpr(scores_N: np.ndarray, is_malicious_N: np.ndarray, max_fpr: float) -> OperatingPoint:
    """The highest recall that some threshold reaches with a false-positive rate of at most `max_fpr`.

    scores_N: float, higher means more malicious; ties move together. is_malicious_N: bool.
    max_fpr: fraction in (0, 1), for example 0.01.
    Raises DataError when a class is absent: the rate would be undefined.
    Source: the operating point of Llama Prompt Guard 2's model card (recall at 1 % FPR).
    """
    need_both_classes(is_malicious_N)
    fpr_K, recall_K, threshold_K = roc_curve(is_malicious_N, scores_N, drop_intermediate=False)
    best = np.flatnonzero(fpr_K <= max_fpr)[-1]  # recall never falls along the curve
    # roc_curve's first threshold is infinity (nothing flagged); a threshold that is saved must be a number.
    threshold = float(threshold_K[best]) if np.isfinite(threshold_K[best]) else float(np.nextafter(np.max(scores_N), np.inf))
    return OperatingPoint(threshold=threshold, recall=float(recall_K[best]), fpr=float(fpr_K[best]))


def need_both_classes(is_malicious_N: np.ndarray) -> None:
    """Raise DataError where a class is absent."""
    if is_malicious_N.all() or not is_malicious_N.any():
        found = "none" if not len(is_malicious_N) else "only malicious rows" if is_malicious_N.all() else "only benign rows"
        raise DataError("the measures need both classes", expected="malicious and benign rows", found=found)


def too_few_benign(benign: int, fpr: float) -> str | None:
    """What to say when recall at a false-positive rate rests on too few benign rows, None when it does not."""
    needed = math.ceil(RULE_OF_THREE / fpr)
    if benign == 0 or benign >= needed:
        return None
    alarms = math.floor(benign * fpr)
    rests = f"rests on {alarms} false alarm{'s' * (alarms > 1)}" if alarms else "allows no false alarm at all"
    return f"recall at {100 * fpr:g} % FPR {rests}: {benign} benign rows, {needed} are needed to tell that rate from 0"


def flip_rate(is_flagged_NS: np.ndarray) -> float:
    """The share of rows whose sampled reasons do not all lead to one verdict; bool, shape (N, samples)."""
    is_flagged_NS = np.asarray(is_flagged_NS, dtype=bool)
    return float((is_flagged_NS.any(axis=1) & ~is_flagged_NS.all(axis=1)).mean())
