"""Two judges on the rows of one set, with a plain answer to which is better. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from guardtrain.evaluate.bootstrap import Difference, compare
from guardtrain.evaluate.scores import Judged

Answer = Literal["yes", "no", "unknown"]
# A gain in recall that lies below one percentage point at its best is none that anyone would pay for.
WORTHWHILE = 0.01
DECISIVE = ("recall_at_1_fpr", "false_positive_rate", "recall")  # the first that a set allows


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two judges on one set. measure: the one that decides; differences: of all measures, `one` minus `other`."""

    set_name: str
    one: str
    other: str
    measure: str
    differences: dict[str, Difference]

    @property
    def decisive(self) -> Difference:
        """The difference in the measure that decides."""
        return self.differences[self.measure]

    @property
    def is_one_better(self) -> Answer:
        """Yes when the whole interval is a gain, no when it holds no gain worth having, else unknown."""
        low, high = self.decisive.interval
        if self.measure == "false_positive_rate":
            low, high = -high, -low
        if low == high == 0:  # no resample tells them apart
            return "unknown"
        return "yes" if low > 0 else "no" if high < WORTHWHILE else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "set": self.set_name,
            "one": self.one,
            "other": self.other,
            "decided_by": self.measure,
            "is_one_better": self.is_one_better,
            "differences": {key: difference.to_json() for key, difference in self.differences.items()},
        }


def compare_judges(set_name: str, one: tuple[str, Judged], other: tuple[str, Judged]) -> Comparison:
    """one, other: their names and what they said of the same rows. Raises DataError where the labels differ."""
    differences = compare(one[1], other[1])
    measure = next(key for key in DECISIVE if key in differences)
    return Comparison(set_name, one[0], other[0], measure, differences)
