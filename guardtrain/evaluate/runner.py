"""Run a guard over labelled rows and measure it in every mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from guardtrain.errors import ConfigError
from guardtrain.evaluate.cascade import Cascade, margins
from guardtrain.evaluate.scores import Measures, measure, recall_at_fpr
from guardtrain.inference.scorer import Prompt, Scored
from guardtrain.types import GuardExample, Label, Mode

EvaluationMode = Literal["off", "on", "both", "cascade"]


class ScoresPrompts(Protocol):
    """What scores prompts: a Scorer, a SharedScorer over several ranks, or vLLM."""

    def score(
        self, prompts: Sequence[Prompt], modes: Collection[Mode], *, escalates: Callable[[float], bool] | None = None
    ) -> Iterable[tuple[int, Scored]]:
        """As `Scorer.score`."""


@dataclass(frozen=True)
class Evaluation:
    """A guard on one set.

    measures: by evaluation mode. scored: one per row, in the rows' order. seconds: wall clock of scoring.
    cascade: the band of mode `cascade`, where it was measured. thresholds: of the guard, of which a cascade needs two.
    """

    measures: dict[EvaluationMode, Measures]
    examples: Sequence[GuardExample] = field(repr=False)
    scored: list[Scored] = field(repr=False)
    seconds: float = 0.0
    cascade: Cascade | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_malicious_N(self) -> np.ndarray:
        """Bool, shape (N,)."""
        return np.array([example.label is Label.MALICIOUS for example in self.examples])

    @property
    def escalation_rate(self) -> float | None:
        """The fraction of rows that the cascade gives a reason; None where there is no cascade."""
        cascade = self.cascade
        if cascade is None:
            return None
        return float(np.mean([cascade.escalates(row.scores[Mode.OFF]) for row in self.scored]))

    def scores(self, mode: EvaluationMode) -> np.ndarray:
        """The score of each row in one evaluation mode, float64, shape (N,)."""
        return scores_of(self.scored, mode, cascade=self.cascade, thresholds=self.thresholds)

    def at(self, thresholds: Mapping[str, float]) -> Evaluation:
        """The same scores, measured at other thresholds (0 where none is given)."""
        modes = list(self.measures)
        measures = _measures(self.scored, self.is_malicious_N, modes, thresholds, self.cascade)
        return replace(self, measures=measures, thresholds=dict(thresholds))

    def to_json(self) -> dict[str, Any]:
        """Figures only: no prompt, no reason."""
        cascade = {**self.cascade.to_json(), "escalation_rate": self.escalation_rate} if self.cascade else None
        return {
            "rows": len(self.scored),
            "seconds": round(self.seconds, 2),
            "rows_per_second": round(len(self.scored) / self.seconds, 2) if self.seconds else None,
            "truncated_reasons": sum(scored.truncated for scored in self.scored),
            **({"cascade": cascade} if cascade else {}),
            "modes": {mode: measures.to_json() for mode, measures in self.measures.items()},
        }


def evaluate(
    scorer: ScoresPrompts,
    examples: Sequence[GuardExample],
    modes: Sequence[EvaluationMode],
    *,
    thresholds: Mapping[str, float] | None = None,
    cascade: Cascade | None = None,
    on_row: Callable[[], None] | None = None,
) -> Evaluation:
    """Score `examples` and measure each mode at its threshold (0 where none is given; that of a cascade is always 0).

    cascade: the band, which mode `cascade` needs. Where no other mode needs a reason, only escalated rows get one.
    on_row: called after each scored row, for a progress bar.
    Raises DataError when a class is absent, ConfigError when the band is.
    """
    if "cascade" in modes and cascade is None:
        raise needs_calibration("modes")
    start = time.perf_counter()
    by_index: dict[int, Scored] = {}
    prompts = [example.prompt for example in examples]
    for index, scored in scorer.score(prompts, run_modes(modes), **_escalation(modes, cascade)):
        by_index[index] = scored
        if on_row:
            on_row()
    scored_rows = [by_index[index] for index in range(len(examples))]
    seconds = time.perf_counter() - start
    is_malicious_N = np.array([example.label is Label.MALICIOUS for example in examples])
    cascade = cascade if "cascade" in modes else None
    measures = _measures(scored_rows, is_malicious_N, modes, thresholds or {}, cascade)
    return Evaluation(measures, examples, scored_rows, seconds, cascade, dict(thresholds or {}))


def needs_calibration(where: str) -> ConfigError:
    """What is said where mode `cascade` is asked for and no band is known."""
    return ConfigError("mode cascade needs a calibrated guard", where=where, hint="guardtrain calibrate writes its band")


def _escalation(modes: Sequence[EvaluationMode], cascade: Cascade | None) -> dict[str, Any]:
    """Which rows are given a reason: those that the cascade escalates, where no other mode needs one for all."""
    if cascade is None or "cascade" not in modes or {"on", "both"} & set(modes):
        return {}
    return {"escalates": cascade.escalates}


def _measures(
    scored_rows: Sequence[Scored],
    is_malicious_N: np.ndarray,
    modes: Sequence[EvaluationMode],
    thresholds: Mapping[str, float],
    cascade: Cascade | None,
) -> dict[EvaluationMode, Measures]:
    measures = {}
    for mode in modes:
        threshold = 0.0 if mode == "cascade" else thresholds.get(mode, 0.0)
        is_parsed_N = is_parsed(scored_rows, mode, cascade)
        scores_N = scores_of(scored_rows, mode, cascade=cascade, thresholds=thresholds)
        ranked_N = ranking_scores(scores_N, is_malicious_N, is_parsed_N, threshold)
        measures[mode] = measure(ranked_N, is_malicious_N, threshold=threshold, is_parsed_N=is_parsed_N)
    return measures


def ranking_scores(
    scores_N: np.ndarray, is_malicious_N: np.ndarray, is_parsed_N: np.ndarray, threshold: float = 0.0
) -> np.ndarray:
    """Scores in which a row without a verdict is as wrong as can be; float64, shape (N,).

    A malicious one ranks below, a benign one above, all rows and the threshold, so that AUROC, AUPRC and recall at a rate pay for
    it as F1 does, whatever its score, which need not be a number. Rows that parsed keep theirs. No two such rows are tied: the
    average precision of tied rows would be that of the last one.
    """
    scores_N = np.asarray(scores_N, dtype=np.float64)
    known_N = np.append(scores_N[is_parsed_N], threshold)
    distance_N = 1.0 + np.arange(len(scores_N))
    worst_N = np.where(is_malicious_N, known_N.min() - distance_N, known_N.max() + distance_N)
    return np.where(is_parsed_N, scores_N, worst_N)


def is_parsed(scored: Sequence[Scored], mode: EvaluationMode, cascade: Cascade | None = None) -> np.ndarray:
    """Whether each row has a verdict of its own in every mode that decided it, bool, shape (N,)."""
    return np.array([all(row.is_natural[part] for part in _decided_by(row, mode, cascade)) for row in scored], dtype=bool)


def _decided_by(row: Scored, mode: EvaluationMode, cascade: Cascade | None) -> list[Mode]:
    if mode == "cascade" and cascade is not None:
        return list(Mode) if cascade.escalates(row.scores[Mode.OFF]) else [Mode.OFF]
    return run_modes([mode])


def run_modes(modes: Sequence[EvaluationMode]) -> list[Mode]:
    """The modes in which the model has to run for these evaluation modes."""
    return list(Mode) if {"both", "cascade"} & set(modes) else [Mode(mode) for mode in modes]


def scores_of(
    scored: Sequence[Scored],
    mode: EvaluationMode,
    *,
    cascade: Cascade | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> np.ndarray:
    """The score of each row in one evaluation mode, float64, shape (N,); a cascade's are `margins`. Raises ConfigError."""
    if mode in ("off", "on"):
        return np.array([row.scores[Mode(mode)] for row in scored])
    off_N, on_N = (np.array([row.scores.get(part, np.nan) for row in scored]) for part in (Mode.OFF, Mode.ON))
    if mode == "both":
        return np.asarray((off_N + on_N) / 2)
    if cascade is None:
        raise needs_calibration("modes")
    return margins(off_N, (off_N + on_N) / 2, cascade, thresholds or {})


def choose_thresholds(evaluation: Evaluation, target_fpr: float) -> dict[str, float]:
    """For each mode, the threshold with the highest recall at a false-positive rate of at most `target_fpr`.

    A cascade has none: its scores are margins to the thresholds of the others.
    """
    return {
        mode: recall_at_fpr(scores_of(evaluation.scored, mode), evaluation.is_malicious_N, target_fpr).threshold
        for mode in evaluation.measures
        if mode != "cascade"
    }
