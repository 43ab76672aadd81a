"""From a score to a probability and a verdict: what calibration has left in guard.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ModeCalibration:
    """One mode. p_malicious = sigmoid(score / temperature + bias); flag when score >= threshold.

    threshold_interval: 95 % of bootstrap samples of the rows. fpr: of those rows at the threshold, with its 95 % interval
    (Clopper and Pearson); all None for contextual calibration, which has no rows.
    """

    temperature: float
    bias: float
    threshold: float
    threshold_interval: tuple[float, float] | None = None
    fpr: float | None = None
    fpr_interval: tuple[float, float] | None = None

    def p_malicious(self, score: float) -> float:
        """Of a score as the guard gives it."""
        return 0.5 * (1 + math.tanh(0.5 * (score / self.temperature + self.bias)))

    def probabilities(self, scores_N: np.ndarray) -> np.ndarray:
        """p_malicious of many scores, float64, shape (N,); NaN stays NaN."""
        return np.asarray(0.5 * (1 + np.tanh(0.5 * (np.asarray(scores_N) / self.temperature + self.bias))))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a guard's scores are to be read, and on what that rests.

    method: "rows" of labelled held-out data, or "contextual" (no data: texts that say nothing are put at p = 0.5).
    modes: by evaluation mode. data: names of the files; data_hash: of their prompts and labels; date: ISO 8601.
    warnings: what the reader of a figure should know.
    """

    method: str
    date: str
    modes: dict[str, ModeCalibration]
    data: tuple[str, ...] = ()
    data_hash: str = ""
    rows: int = 0
    malicious: int = 0
    target_fpr: float | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def thresholds(self) -> dict[str, float]:
        """By evaluation mode."""
        return {mode: each.threshold for mode, each in self.modes.items()}

    def to_json(self) -> dict[str, Any]:
        """As it stands in guard.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Calibration:
        """The inverse of `to_json`. Raises TypeError, KeyError, AttributeError for anything else."""
        modes = {mode: _mode_from_json(each) for mode, each in tree["modes"].items()}
        return cls(**{**tree, "modes": modes, "data": tuple(tree["data"]), "warnings": tuple(tree["warnings"])})

    def said(self) -> str:
        """One line for people."""
        if self.method == "contextual":
            return (
                f"calibrated without data on {self.date}: texts that say nothing stand at 0.5; thresholds have no measured rate"
            )
        return (
            f"calibrated on {self.date} on {self.rows} rows ({self.malicious} malicious) of {', '.join(self.data)}, "
            f"thresholds at {100 * (self.target_fpr or 0):g} % false alarms there"
        )


def _mode_from_json(tree: dict[str, Any]) -> ModeCalibration:
    pairs = {key: None if tree[key] is None else tuple(tree[key]) for key in ("threshold_interval", "fpr_interval")}
    return ModeCalibration(**{**tree, **pairs})
