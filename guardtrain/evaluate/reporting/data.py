"""What a report is written from. Plain data that the evaluation fills, and the figures that follow from it, drawn once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from guardtrain.errors import DataError
from guardtrain.evaluate.bootstrap import with_intervals
from guardtrain.evaluate.reporting.comparison import Comparison, compare_judges
from guardtrain.evaluate.scores import Judged, Measures
from guardtrain.inference.calibration import Calibration
from guardtrain.types import GuardExample, Label

Axis = Literal["harm", "injection", "over-refusal", "mixed"]
AXES: tuple[Axis, ...] = ("injection", "harm", "mixed", "over-refusal")
MODES = ("off", "on", "both", "cascade")
REASONING_MODES = ("both", "on", "cascade")  # the first that was run is compared with mode off


@dataclass(frozen=True, slots=True)
class Contaminated:
    """A row that was left out because it stands in the training data. similarity: in (0, 1]."""

    id: str
    kind: str
    similarity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of one mode: rows a second in batches; seconds from one prompt to its verdict. None where it was not measured."""

    rows_per_second: float | None = None
    p50_seconds: float | None = None
    p95_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class SetReport:
    """A guard on one set.

    examples: the rows of the headline, without the contaminated ones. judged: by evaluation mode; controls: by name ("TF-IDF +
    logistic regression"); both on those rows, in their order. reasons: one a row, None where there is none; empty without any.
    is_calibration_set: the thresholds were chosen on these rows.
    Raises DataError where the parts do not belong to the same rows.
    """

    name: str
    axis: Axis
    examples: Sequence[GuardExample]
    judged: Mapping[str, Judged]
    controls: Mapping[str, Judged] = field(default_factory=dict)
    reasons: Sequence[str | None] = ()
    contaminated: Sequence[Contaminated] = ()
    licence: str = ""
    note: str = ""
    is_calibration_set: bool = False

    def __post_init__(self) -> None:
        if not self.judged:
            raise DataError("nothing was judged", where=self.name, expected="at least one mode")
        if both := self.judged.keys() & self.controls.keys():
            raise DataError("a control that is named like a mode", where=self.name, found=min(both))
        for name, judged in self.judges.items():
            if not np.array_equal(judged.is_malicious_N, self.is_malicious_N):
                found = f"{len(judged.scores_N)} rows, or other labels"
                raise DataError(f"{name} did not judge the examples", where=self.name, expected=self._rows, found=found)
        if self.reasons and len(self.reasons) != len(self.examples):
            found = f"{len(self.reasons)} reasons"
            raise DataError("reasons of other rows", where=self.name, expected=self._rows, found=found)

    @property
    def _rows(self) -> str:
        return f"{len(self.examples)} rows"

    @cached_property
    def judges(self) -> dict[str, Judged]:
        """Modes in their usual order, then controls."""
        ordered = sorted(self.judged, key=lambda mode: MODES.index(mode) if mode in MODES else len(MODES))
        return {**{mode: self.judged[mode] for mode in ordered}, **self.controls}

    @cached_property
    def is_malicious_N(self) -> np.ndarray:
        """Bool, shape (N,)."""
        return np.array([example.label is Label.MALICIOUS for example in self.examples], dtype=bool)

    @cached_property
    def measures(self) -> dict[str, Measures]:
        """With 95 % intervals, of every mode and control."""
        return {name: with_intervals(judged) for name, judged in self.judges.items()}

    @property
    def malicious(self) -> int:
        """Rows of that class."""
        return int(self.is_malicious_N.sum())

    @property
    def benign(self) -> int:
        """Rows of that class."""
        return len(self.examples) - self.malicious


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a reader is told.

    model: the argument that names the guard. mode: the one it will run in, in which every set was judged.
    attacks: the attack table in that mode: one entry for each pair of defences, {"normalise": bool, "chunk": bool, "evasion":
    {family: {clean_flagged, evaded, recall, false_alarms}}}, each a {count, of, value, low, high}.
    escalation_rate: the share of rows for which the cascade reasons. flip_rate: of rows whose sampled reasons disagree.
    environment: date, versions, processor and accelerator. seconds: of the whole evaluation. notes: anything else.
    Raises DataError where a set lacks the mode, or the threshold of a mode differs between sets.
    """

    model: str
    base_model: str
    method: str
    policy: str
    mode: str
    sets: Sequence[SetReport]
    calibration: Calibration | None = None
    speed: Mapping[str, Speed] = field(default_factory=dict)
    escalation_rate: float | None = None
    flip_rate: float | None = None
    attacks: Sequence[Mapping[str, Any]] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    seconds: float | None = None
    training_rows: int | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.sets:
            raise DataError("nothing to report", expected="at least one set")
        if len({each.name for each in self.sets}) < len(self.sets):
            raise DataError("two sets of one name", found=", ".join(each.name for each in self.sets))
        for each in self.sets:
            if self.mode not in each.judged:
                raise DataError("a set without the mode that the guard runs in", where=each.name, expected=self.mode)
        for mode in {mode for each in self.sets for mode in each.judged}:
            thresholds = {each.judged[mode].threshold for each in self.sets if mode in each.judged}
            if len(thresholds) > 1:
                found = ", ".join(f"{threshold:g}" for threshold in sorted(thresholds))
                raise DataError(f"one guard, several thresholds in mode {mode}", expected="one for all sets", found=found)

    @property
    def threshold(self) -> float:
        """Of the mode that the guard runs in."""
        return self.sets[0].judged[self.mode].threshold

    @cached_property
    def modes(self) -> list[str]:
        """Every mode of any set, in the usual order."""
        found = dict.fromkeys(name for each in self.sets for name in each.judges if name in each.judged)
        return sorted(found, key=lambda mode: MODES.index(mode) if mode in MODES else len(MODES))

    @cached_property
    def controls(self) -> list[str]:
        """Every control of any set."""
        return list(dict.fromkeys(name for each in self.sets for name in each.controls))

    def of_axis(self, axis: Axis) -> list[SetReport]:
        """The sets of one axis."""
        return [each for each in self.sets if each.axis == axis]

    def headline_sets(self, axis: Axis) -> list[SetReport]:
        """The sets of an axis, without the calibration set where others are left."""
        sets = self.of_axis(axis)
        return [each for each in sets if not each.is_calibration_set] or sets

    @cached_property
    def pooled(self) -> dict[Axis, Measures]:
        """The mode that the guard runs in, on all headline rows of an axis together, with 95 % intervals."""
        return {axis: _pooled(sets, self.mode) for axis in AXES if (sets := self.headline_sets(axis))}

    @cached_property
    def reasoning(self) -> list[Comparison]:
        """A mode that reasons against mode off, on every set that was judged in both."""
        found = []
        for each in self.sets:
            modes = [mode for mode in REASONING_MODES if mode in each.judged]
            if modes and "off" in each.judged:
                found.append(compare_judges(each.name, (modes[0], each.judged[modes[0]]), ("off", each.judged["off"])))
        return found

    @cached_property
    def against_controls(self) -> list[Comparison]:
        """The guard as it will run against every control of every set."""
        return [
            compare_judges(each.name, (self.mode, each.judged[self.mode]), control)
            for each in self.sets
            for control in each.controls.items()
        ]


def _pooled(sets: Sequence[SetReport], mode: str) -> Measures:
    if len(sets) == 1:
        return sets[0].measures[mode]
    parts = [each.judged[mode] for each in sets]
    joined = Judged(
        scores_N=np.concatenate([part.scores_N for part in parts]),
        is_malicious_N=np.concatenate([part.is_malicious_N for part in parts]),
        is_parsed_N=np.concatenate([parsed(part) for part in parts]),
        p_malicious_N=np.concatenate([part.probabilities_N for part in parts]),
        threshold=parts[0].threshold,
    )
    return with_intervals(joined)


def parsed(judged: Judged) -> np.ndarray:
    """Whether each row has a verdict of the guard's own, bool, shape (N,)."""
    assert judged.is_parsed_N is not None
    return judged.is_parsed_N
