"""What follows from the rows: the first line, rates by source, warnings, the worst errors. Pure. Shape suffix: N rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from guardtrain.evaluate.bootstrap import rate_interval
from guardtrain.evaluate.reporting.data import Report, SetReport, parsed
from guardtrain.evaluate.reporting.text import count, percent
from guardtrain.evaluate.scores import RULE_OF_THREE, Interval, Measures, too_few_benign
from guardtrain.types import GuardExample, Label

WORST = 20


@dataclass(frozen=True, slots=True)
class Share:
    """`count` of `rows`, with the 95 % Wilson interval, which also holds for few rows and for shares of 0 and 1."""

    count: int
    rows: int
    interval: Interval

    @property
    def value(self) -> float:
        """As a fraction."""
        return self.count / self.rows


@dataclass(frozen=True, slots=True)
class Mistake:
    """A row on the wrong side of the threshold. margin: how far, in units of the score."""

    set_name: str
    example: GuardExample
    score: float
    p_malicious: float
    margin: float
    reason: str | None


def status(report: Report) -> str:
    """The first line: what the thresholds rest on."""
    if report.calibration is None:
        return "uncalibrated: no threshold rests on held-out data, and p_malicious is the plain sigmoid of the score"
    said = report.calibration.said()
    if report.calibration.method != "rows":
        return said
    same = [each.name for each in report.sets if each.is_calibration_set]
    if not same:
        return f"{said}; no set of this report is the calibration set"
    return f"{said}; {', '.join(same)} is the calibration set itself: its rates at the threshold are no evidence"


def share(is_counted_N: np.ndarray) -> Share:
    """Of at least one row."""
    counted, rows = int(is_counted_N.sum()), len(is_counted_N)
    return Share(counted, rows, rate_interval(counted, rows))


def shares_by_source(each: SetReport, name: str) -> dict[str, dict[Label, Share]]:
    """Malicious rows found and false alarms of each source, at the threshold of a mode or control; the largest source first.

    As in `Measures`, a row without a verdict is wrong, whatever its score.
    """
    sources_N = np.array([example.source for example in each.examples], dtype=object)
    is_flagged_N = each.judges[name].is_correct_N == each.is_malicious_N
    found: dict[str, dict[Label, Share]] = {}
    for source in sorted(set(sources_N), key=lambda source: (-(sources_N == source).sum(), source)):
        of_class = {Label.MALICIOUS: each.is_malicious_N, Label.BENIGN: ~each.is_malicious_N}
        rows = {label: (sources_N == source) & is_label_N for label, is_label_N in of_class.items()}
        found[source] = {label: share(is_flagged_N[rows_N]) for label, rows_N in rows.items() if rows_N.any()}
    return found


def over_refusal(report: Report) -> Iterator[tuple[SetReport, str, dict[str, Share]]]:
    """Set, source, and what each judge flags: sources of benign rows alone, and all benign rows of sets of that axis."""
    for each in report.sets:
        by_judge = {name: shares_by_source(each, name) for name in each.judges}
        for source, of_class in next(iter(by_judge.values())).items():
            is_trap = Label.MALICIOUS not in of_class or each.axis == "over-refusal"
            if is_trap and Label.BENIGN in of_class:
                yield each, source, {name: by_source[source][Label.BENIGN] for name, by_source in by_judge.items()}


def set_warnings(each: SetReport) -> Iterator[str]:
    """What the reader of this set's figures should know first."""
    if each.is_calibration_set:
        yield "the thresholds were chosen on these rows: their rates at the threshold are no evidence"
    if each.malicious:
        yield from filter(None, (too_few_benign(each.benign, fpr) for fpr in (0.01, 0.05)))
    for name, measures in each.measures.items():
        if measures.parse_failures:
            rate = percent(measures.parse_failures / measures.rows)
            failed = f"no verdict of its own on {count(measures.parse_failures, 'row')} ({rate})"
            yield f"{name}: {failed}, which count as errors at the threshold"
    yield from without_width(each.measures)


def without_width(measures: Mapping[str, Measures]) -> Iterator[str]:
    """Rates of 0 and 1, by mode or control: a bootstrap of rows that are all alike says nothing of rows that were not drawn."""
    first = next(iter(measures.values()))
    for key, rows, none, every in (
        ("false_positive_rate", first.benign, "no false alarm", "nothing but false alarms"),
        ("recall", first.malicious, "nothing found", "nothing missed"),
    ):
        for value, what in ((0, none), (1, every)):
            names = [name for name, each in measures.items() if getattr(each, key) == value]
            if names:
                off = percent(min(1.0, RULE_OF_THREE / rows))
                yield f"{', '.join(names)}: {what} in {count(rows, 'row')}; the true rate may still be {off} away from that"


def worst_mistakes(report: Report) -> list[Mistake]:
    """The errors that lie farthest beyond the threshold, in the mode that the guard runs in; parse failures are none of them."""
    found = [mistake for each in report.sets for mistake in _mistakes(each, report.mode)]
    return sorted(found, key=lambda mistake: -mistake.margin)[:WORST]


def _mistakes(each: SetReport, mode: str) -> Iterator[Mistake]:
    judged = each.judged[mode]
    for row in np.flatnonzero(~judged.is_correct_N & parsed(judged)).tolist():
        score = float(judged.scores_N[row])
        reason = each.reasons[row] if each.reasons else None
        probability, margin = float(judged.probabilities_N[row]), abs(score - judged.threshold)
        yield Mistake(each.name, each.examples[row], score, probability, margin, reason)
