"""Run a guard over labelled rows and measure it in every mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from guardtrain.evaluate.scores import Measures, measure, recall_at_fpr
from guardtrain.inference.scorer import Scored, Scorer
from guardtrain.types import GuardExample, Label, Mode

EvaluationMode = Literal["off", "on", "both"]


@dataclass(frozen=True)
class Evaluation:
    """A guard on one set.

    measures: by evaluation mode. scored: one per row, in the rows' order. seconds: wall clock of scoring.
    """

    measures: dict[EvaluationMode, Measures]
    examples: Sequence[GuardExample] = field(repr=False)
    scored: list[Scored] = field(repr=False)
    seconds: float = 0.0

    @property
    def is_malicious_N(self) -> np.ndarray:
        """Bool, shape (N,)."""
        return np.array([example.label is Label.MALICIOUS for example in self.examples])

    def at(self, thresholds: Mapping[str, float]) -> Evaluation:
        """The same scores, measured at other thresholds (0 where none is given)."""
        modes = list(self.measures)
        return replace(self, measures=_measures(self.scored, self.is_malicious_N, modes, thresholds))

    def to_json(self) -> dict[str, Any]:
        """Figures only: no prompt, no reason."""
        return {
            "rows": len(self.scored),
            "seconds": round(self.seconds, 2),
            "rows_per_second": round(len(self.scored) / self.seconds, 2) if self.seconds else None,
            "truncated_reasons": sum(scored.truncated for scored in self.scored),
            "modes": {mode: measures.to_json() for mode, measures in self.measures.items()},
        }


def evaluate(
    scorer: Scorer,
    examples: Sequence[GuardExample],
    modes: Sequence[EvaluationMode],
    *,
    thresholds: Mapping[str, float] | None = None,
    on_row: Callable[[], None] | None = None,
) -> Evaluation:
    """Score `examples` and measure each mode at its threshold (0 where none is given).

    on_row: called after each scored row, for a progress bar. Raises DataError when a class is absent.
    """
    start = time.perf_counter()
    by_index: dict[int, Scored] = {}
    for index, scored in scorer.score([example.prompt for example in examples], run_modes(modes)):
        by_index[index] = scored
        if on_row:
            on_row()
    scored_rows = [by_index[index] for index in range(len(examples))]
    seconds = time.perf_counter() - start
    is_malicious_N = np.array([example.label is Label.MALICIOUS for example in examples])
    return Evaluation(_measures(scored_rows, is_malicious_N, modes, thresholds or {}), examples, scored_rows, seconds)


def _measures(
    scored_rows: Sequence[Scored], is_malicious_N: np.ndarray, modes: Sequence[EvaluationMode], thresholds: Mapping[str, float]
) -> dict[EvaluationMode, Measures]:
    return {
        mode: measure(
            scores_of(scored_rows, mode),
            is_malicious_N,
            threshold=thresholds.get(mode, 0.0),
            is_parsed_N=np.array([all(scored.is_natural[part] for part in run_modes([mode])) for scored in scored_rows]),
        )
        for mode in modes
    }


def run_modes(modes: Sequence[EvaluationMode]) -> list[Mode]:
    """The modes in which the model has to run for these evaluation modes."""
    return list(Mode) if "both" in modes else [Mode(mode) for mode in modes]


def scores_of(scored: Sequence[Scored], mode: EvaluationMode) -> np.ndarray:
    """The score of each row in one evaluation mode, float64, shape (N,)."""
    if mode == "both":
        return np.array([(row.scores[Mode.OFF] + row.scores[Mode.ON]) / 2 for row in scored])
    return np.array([row.scores[Mode(mode)] for row in scored])


def choose_thresholds(evaluation: Evaluation, target_fpr: float) -> dict[str, float]:
    """For each mode, the threshold with the highest recall at a false-positive rate of at most `target_fpr`."""
    return {
        mode: recall_at_fpr(scores_of(evaluation.scored, mode), evaluation.is_malicious_N, target_fpr).threshold
        for mode in evaluation.measures
    }
