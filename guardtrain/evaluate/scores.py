"""Pure measures of scores against labels. Shape suffix: N rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from guardtrain.errors import DataError


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold (flag when score >= threshold) and what it gives."""

    threshold: float
    recall: float
    fpr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """How one mode of a guard did on one set. Rates are fractions; `threshold` is the frozen one that f1 and flagged use.

    parse_failures: rows on which a free-running guard would have given no verdict; they count as errors in f1, recall and
    false_positive_rate, whatever their score.
    """

    rows: int
    malicious: int
    threshold: float
    auroc: float
    auprc: float
    f1: float
    recall: float
    false_positive_rate: float
    flagged: float
    recall_at_1_fpr: float
    recall_at_5_fpr: float
    parse_failures: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, rounded to six digits."""
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def measure(
    scores_N: np.ndarray, is_malicious_N: np.ndarray, *, threshold: float = 0.0, is_parsed_N: np.ndarray | None = None
) -> Measures:
    """All measures of one mode on one set.

    scores_N: float, higher means more malicious; is_malicious_N: bool; is_parsed_N: bool, None for all parsed.
    Raises DataError when a class is absent or a score is not finite.
    """
    scores_N, is_malicious_N = np.asarray(scores_N, dtype=np.float64), np.asarray(is_malicious_N, dtype=bool)
    if not np.isfinite(scores_N).all():
        raise DataError("a score is not a number", expected="finite scores", found=f"{(~np.isfinite(scores_N)).sum()} others")
    _need_both_classes(is_malicious_N)
    is_parsed_N = np.ones_like(is_malicious_N) if is_parsed_N is None else np.asarray(is_parsed_N, dtype=bool)
    is_flagged_N = scores_N >= threshold
    is_correct_N = (is_flagged_N == is_malicious_N) & is_parsed_N
    hits = int((is_correct_N & is_malicious_N).sum())
    misses = int((~is_correct_N & is_malicious_N).sum())
    false_alarms = int((~is_correct_N & ~is_malicious_N).sum())
    return Measures(
        rows=len(scores_N),
        malicious=int(is_malicious_N.sum()),
        threshold=float(threshold),
        auroc=float(roc_auc_score(is_malicious_N, scores_N)),
        auprc=float(average_precision_score(is_malicious_N, scores_N)),
        f1=2 * hits / (2 * hits + misses + false_alarms),
        recall=hits / (hits + misses),
        false_positive_rate=false_alarms / int((~is_malicious_N).sum()),
        flagged=float(is_flagged_N.mean()),
        recall_at_1_fpr=recall_at_fpr(scores_N, is_malicious_N, 0.01).recall,
        recall_at_5_fpr=recall_at_fpr(scores_N, is_malicious_N, 0.05).recall,
        parse_failures=int((~is_parsed_N).sum()),
    )


def recall_at_fpr(scores_N: np.ndarray, is_malicious_N: np.ndarray, max_fpr: float) -> OperatingPoint:
    """The highest recall that some threshold reaches with a false-positive rate of at most `max_fpr`.

    scores_N: float, higher means more malicious; ties move together. is_malicious_N: bool.
    max_fpr: fraction in (0, 1), for example 0.01.
    Raises DataError when a class is absent: the rate would be undefined.
    Source: the operating point of Llama Prompt Guard 2's model card (recall at 1 % FPR).
    """
    _need_both_classes(is_malicious_N)
    fpr_K, recall_K, threshold_K = roc_curve(is_malicious_N, scores_N, drop_intermediate=False)
    best = np.flatnonzero(fpr_K <= max_fpr)[-1]  # recall never falls along the curve
    # roc_curve's first threshold is infinity (nothing flagged); a threshold that is saved must be a number.
    threshold = float(threshold_K[best]) if np.isfinite(threshold_K[best]) else float(np.nextafter(np.max(scores_N), np.inf))
    return OperatingPoint(threshold=threshold, recall=float(recall_K[best]), fpr=float(fpr_K[best]))


def _need_both_classes(is_malicious_N: np.ndarray) -> None:
    if is_malicious_N.all() or not is_malicious_N.any():
        found = "none" if not len(is_malicious_N) else "only malicious rows" if is_malicious_N.all() else "only benign rows"
        raise DataError("the measures need both classes", expected="malicious and benign rows", found=found)
