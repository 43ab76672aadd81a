"""How firm verdicts are: the same prompt, judged after several sampled reasons."""

from __future__ import annotations

import numpy as np


def flip_rate(scores_NK: np.ndarray, threshold: float = 0.0) -> float:
    """The fraction of rows whose verdicts are not unanimous.

    scores_NK: scores of N rows in mode `on` after K sampled reasons each (`Scorer.sample`); flagged at `threshold` and above.
    """
    flagged_NK = np.asarray(scores_NK) >= threshold
    return float((flagged_NK.any(axis=1) & ~flagged_NK.all(axis=1)).mean())
