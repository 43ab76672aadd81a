"""The cascade: mode `off` decides where it is clear, and only the rows between pay for a reason.

Pure. Shape suffix: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from guardtrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cascade:
    """The band of scores in mode `off` in which a row is escalated: low <= score < high.

    Below it a row is benign, from `high` on malicious; an escalated row is decided by the mean of its two scores at the
    threshold of mode `both`. A band without width escalates nothing. Raises ConfigError where low > high or one is no number.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ConfigError("not a band", where="cascade", expected="low <= high", found=f"low {self.low}, high {self.high}")

    def escalates(self, off_score: float) -> bool:
        """Whether mode `off` leaves the row undecided."""
        return self.low <= off_score < self.high

    def to_json(self) -> dict[str, float]:
        """What `guard.json` holds."""
        return asdict(self)


def margins(off_N: np.ndarray, both_N: np.ndarray, cascade: Cascade, thresholds: Mapping[str, float]) -> np.ndarray:
    """The score of the cascade, float64, shape (N,): flagged where it is at least 0.

    It is the margin to the threshold of the mode that decided: off less its threshold on clear rows, the mean of both less theirs
    on escalated ones. The two are logits from operating points of one false-positive rate, so rows rank among each other. Where
    the band does not hold the threshold of mode `off`, the band decides: the margin of a clear row has the sign of its verdict.
    both_N: NaN is allowed where a row is not escalated.
    """
    off_N = np.asarray(off_N, dtype=np.float64)
    is_escalated_N = (off_N >= cascade.low) & (off_N < cascade.high)
    threshold = float(np.clip(thresholds.get("off", 0.0), cascade.low, cascade.high))
    return np.where(is_escalated_N, np.asarray(both_N) - thresholds.get("both", 0.0), off_N - threshold)
