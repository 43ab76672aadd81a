"""Run a guard over labelled rows and measure it in every mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from guardtrain.errors import ConfigError
from guardtrain.evaluate.scores import Judged, Measures, measures_of
from guardtrain.inference.calibration import Calibration
from guardtrain.inference.cascade import Cascade, margins
from guardtrain.inference.scored import Prompt, Scored
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
    calibration: what makes probabilities of scores; without one it is the sigmoid of the score itself.
    """

    measures: dict[EvaluationMode, Measures]
    examples: Sequence[GuardExample] = field(repr=False)
    scored: list[Scored] = field(repr=False)
    seconds: float = 0.0
    cascade: Cascade | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    calibration: Calibration | None = None

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

    def judged(self, mode: EvaluationMode) -> Judged:
        """The rows as one mode judged them, at its threshold (0 where there is none; that of a cascade is always 0)."""
        return Judged(
            scores_N=self.scores(mode),
            is_malicious_N=self.is_malicious_N,
            threshold=0.0 if mode == "cascade" else self.thresholds.get(mode, 0.0),
            is_parsed_N=is_parsed(self.scored, mode, self.cascade),
            p_malicious_N=self._probabilities(mode),
        )

    def at(self, thresholds: Mapping[str, float]) -> Evaluation:
        """The same scores, measured at other thresholds (0 where none is given)."""
        return replace(self, thresholds=dict(thresholds))._measured(list(self.measures))

    def calibrated(self, calibration: Calibration) -> Evaluation:
        """The same scores, measured at the thresholds and with the probabilities of a calibration."""
        return replace(self, calibration=calibration).at(calibration.thresholds)

    def _measured(self, modes: Sequence[EvaluationMode]) -> Evaluation:
        return replace(self, measures={mode: measures_of(self.judged(mode)) for mode in modes})

    def _probabilities(self, mode: EvaluationMode) -> np.ndarray | None:
        """p_malicious, shape (N,); a cascade's are those of the mode that decided. None for a mode without calibration."""
        if self.calibration is None:
            return None
        if mode != "cascade" or self.cascade is None:
            known = self.calibration.modes.get(mode)
            return known.probabilities(self.scores(mode)) if known else None
        is_escalated_N = np.array([self.cascade.escalates(row.scores[Mode.OFF]) for row in self.scored])
        off, both = self.calibration.modes["off"], self.calibration.modes["both"]
        return np.where(is_escalated_N, both.probabilities(self.scores("both")), off.probabilities(self.scores("off")))

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
    calibration: Calibration | None = None,
    thresholds: Mapping[str, float] | None = None,
    cascade: Cascade | None = None,
    on_row: Callable[[], None] | None = None,
) -> Evaluation:
    """Score `examples` and measure each mode at its threshold (0 where none is given; that of a cascade is always 0).

    thresholds: by mode; those of the calibration if absent. cascade: the band, which mode `cascade` needs. Where no other mode
    needs a reason, only escalated rows get one. on_row: called after each scored row, for a progress bar.
    Raises DataError when there are no rows, ConfigError when there is no band.
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
    if thresholds is None:
        thresholds = calibration.thresholds if calibration else {}
    cascade = cascade if "cascade" in modes else None
    return Evaluation({}, examples, scored_rows, seconds, cascade, thresholds, calibration)._measured(modes)


def needs_calibration(where: str) -> ConfigError:
    """What is said where mode `cascade` is asked for and no band is known."""
    return ConfigError("mode cascade needs a calibrated guard", where=where, hint="guardtrain calibrate writes its band")


def _escalation(modes: Sequence[EvaluationMode], cascade: Cascade | None) -> dict[str, Any]:
    """Which rows are given a reason: those that the cascade escalates, where no other mode needs one for all."""
    if cascade is None or "cascade" not in modes or {"on", "both"} & set(modes):
        return {}
    return {"escalates": cascade.escalates}


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
