"""The search for robust units: those that can be disturbed together while the probe still sees what it saw.

A unit alone says little: of two units that carry the same signal, neither is missed. So units are added in the order of their own
drops, and what counts is the drop of all of them together: a drop of `kept_auroc`. Balanced accuracy moves by whole prompts, and
two of a hundred, as much as tau, change sides whatever is disturbed (2026-11, SmolLM2: 2 to 22 of 210 units were robust, as the
noise fell); AUROC does not see that all prompts moved to one side (149 were, and of them the probe's accuracy fell to chance).
Pure: what is measured, and where, is for the caller to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from guardtrain.errors import ModelError
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.units import Unit

WEAKEST, STEP = 2.0**-6, 4.0
BISECTIONS = 4  # of STEP: the strength is within 9 %
FIRST_STEP = 16  # units that are taken together to begin with
KNOWS_SOMETHING = 0.6  # AUROC of a probe that a drop can be measured of
SEARCH, REPORT, OUTSIDE = "search", "report", "out of source"


@dataclass(frozen=True)
class Task:
    """One measurement: the probe on some prompts while `units` are disturbed; without any, of the untouched model."""

    units: tuple[Unit, ...] = ()
    strength: float = 0.0
    seed: int = 0
    prompts: str = SEARCH


Measure = Callable[[Sequence[Task]], Sequence[ProbeFigures]]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a disturbance costs the probe, as a mean over seeds. drop: of `kept_auroc`. margin: orders what that leaves equal."""

    drop: float
    margin: float


class Search:
    """Questions about sets of units, each put to `measure` for every seed.

    seeds: of the disturbances. strongest: a strength that is not to be gone beyond.
    """

    def __init__(self, measure: Measure, units: Sequence[Unit], *, seeds: Sequence[int], strongest: float) -> None:
        self.measure, self.units, self.seeds, self.strongest = measure, tuple(units), tuple(seeds), strongest
        (self.untouched,) = measure([Task()])
        if self.untouched.auroc < KNOWS_SOMETHING:
            found = f"AUROC {self.untouched.auroc:.2f} on the search prompts"
            expected = f"at least {KNOWS_SOMETHING:.2f}"
            raise ModelError("the probe cannot tell malicious from benign", expected=expected, found=found)

    def drop(self, units: Sequence[Unit], strength: float) -> float:
        """`kept_auroc` that is lost while all of `units` are disturbed."""
        return self._losses(self.measure(self._tasks(units, strength))).drop

    def breaking_strength(self) -> float:
        """The smallest strength at which the probe is broken: no more than half of what it knew above chance is left.

        Raises ModelError where nothing breaks it.
        """
        broken = (self.untouched.auroc - 0.5) / 2

        def breaks(exponent: float) -> bool:
            return self.drop(self.units, 2.0**exponent) >= broken

        high, last, step = math.log2(WEAKEST), math.log2(self.strongest), math.log2(STEP)
        while not breaks(high):
            if high >= last:
                expected, found = f"a drop of {broken:.2f}", f"less at strength {self.strongest:g}"
                raise ModelError("nothing breaks the probe", expected=expected, found=found)
            high = min(high + step, last)
        low = high - step
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if breaks(middle) else (middle, high)
        return float(2.0**high)

    def alone(self, strength: float) -> dict[Unit, Losses]:
        """What each unit costs alone."""
        figures = iter(self.measure([task for unit in self.units for task in self._tasks([unit], strength)]))
        return {unit: self._losses([next(figures) for _ in self.seeds]) for unit in self.units}

    def _tasks(self, units: Sequence[Unit], strength: float) -> list[Task]:
        return [Task(tuple(units), strength, seed) for seed in self.seeds]

    def _losses(self, figures: Sequence[ProbeFigures]) -> Losses:
        mean = mean_figures(figures)
        return Losses(drop=self.untouched.kept_auroc - mean.kept_auroc, margin=self.untouched.mean_margin - mean.mean_margin)


def mean_figures(figures: Sequence[ProbeFigures]) -> ProbeFigures:
    """Each figure's mean."""
    rows = [(each.balanced_accuracy, each.auroc, each.mean_margin, each.kept_auroc) for each in figures]
    return ProbeFigures(*(float(column) for column in np.mean(rows, axis=0)))


def ascending(alone: dict[Unit, Losses]) -> list[Unit]:
    """The units that cost least first."""
    return sorted(alone, key=lambda unit: (alone[unit].drop, alone[unit].margin))


def grow(order: Sequence[Unit], drop: Callable[[Sequence[Unit]], float], tau: float) -> tuple[list[Unit], float]:
    """The units of `order`, from its beginning, that are robust together, and their drop: the next would bring it above `tau`.

    Steps double as long as that holds and are then halved: few calls of `drop`, and the last one that held is of the result.
    """
    robust, reached, refused = 0, 0.0, len(order) + 1
    step, doubles = FIRST_STEP, True
    while step and robust < len(order):
        wanted = min(robust + step, len(order))
        if wanted < refused:
            found = drop(order[:wanted])
            if found <= tau:
                robust, reached = wanted, found
            else:
                refused, doubles = wanted, False
        step = 2 * step if doubles else step // 2
    return list(order[:robust]), reached
