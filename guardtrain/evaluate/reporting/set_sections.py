"""What a report says of each set: figures with intervals, warnings, sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guardtrain.evaluate.reporting.data import AXES, Axis, Report, SetReport
from guardtrain.evaluate.reporting.document import Block, Cell, Estimate, Paragraph, Pictures, Section, Table, Warned
from guardtrain.evaluate.reporting.figures import MOST_SOURCES, set_pictures
from guardtrain.evaluate.reporting.findings import Share, over_refusal, set_warnings, shares_by_source
from guardtrain.evaluate.reporting.text import DASH, count, decimal, decimal_interval, percent, percent_interval
from guardtrain.evaluate.scores import Interval, Measures
from guardtrain.types import Label

MEASURES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "recall_at_1_fpr": "recall at 1 % FPR",
    "recall_at_5_fpr": "recall at 5 % FPR",
    "recall": "recall at the threshold",
    "false_positive_rate": "false alarms at the threshold",
    "flagged": "flagged of all rows",
    "f1": "F1",
    "mcc": "MCC",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
}
RATES = {"recall_at_1_fpr", "recall_at_5_fpr", "recall", "false_positive_rate", "flagged"}
AXIS_TITLES: dict[Axis, str] = {
    "injection": "Prompt injection",
    "harm": "Harmful requests",
    "mixed": "Mixed sets",
    "over-refusal": "Over-refusal",
}
AXIS_MEANINGS: dict[Axis, str] = {
    "injection": "Texts that try to take over an agent, against texts that only look like it.",
    "harm": "Requests for harmful content or action, against harmless ones.",
    "mixed": "Sets that hold injection and harm together.",
    "over-refusal": "Harmless texts that sound dangerous: what is flagged here is a user turned away.",
}


def axis_sections(report: Report, *, has_pictures: bool) -> Iterator[Section]:
    """A section for each axis that has sets, each followed by those of its sets."""
    for axis in AXES:
        sets = report.of_axis(axis)
        if sets:
            yield Section(AXIS_TITLES[axis], (Paragraph(AXIS_MEANINGS[axis]),), is_for_card=True)
        for each in sets:
            yield _set_section(each, report, has_pictures)


def _set_section(each: SetReport, report: Report, has_pictures: bool) -> Section:
    rows = f"{count(len(each.examples), 'row')}: {each.malicious:,} malicious, {each.benign:,} benign."
    left_out = f" {count(len(each.contaminated), 'row')} left out as contaminated." if each.contaminated else ""
    note = f" {each.note}" if each.note else ""
    warnings = tuple(set_warnings(each))
    warned = [Warned(warnings)] if warnings else []
    pictures = [Pictures(set_pictures(each, report.mode))] if has_pictures else []
    blocks: list[Block] = [Paragraph(f"{rows}{left_out}{note}"), *warned, measures_table(each), *pictures]
    return Section(each.name, (*blocks, *sources_tables(each, report.mode)), level=3, is_for_card=True)


def measures_table(each: SetReport) -> Table:
    """A line for each measure, a column for each mode and control."""
    rows: list[tuple[Cell, ...]] = []
    for key, title in MEASURES.items():
        rows.append((title, *(measure_cell(measures, key) for measures in each.measures.values())))
    rows.append(("threshold", *(decimal(measures.threshold) for measures in each.measures.values())))
    rows.append(("rows without a verdict", *(f"{measures.parse_failures:,}" for measures in each.measures.values())))
    caption = f"{each.name}: figures with 95 % intervals, each column at its own frozen threshold"
    return Table(caption, ("measure", *each.measures), tuple(rows))


def measure_cell(measures: Measures, key: str) -> Estimate:
    """A rate in per cent, another figure with three digits; a dash where the set lacks the rows for it."""
    value, interval = getattr(measures, key), measures.intervals.get(key)
    return rate_cell(value, interval) if key in RATES else _cell(value, interval, decimal, decimal_interval)


def rate_cell(value: float | None, interval: Interval | None) -> Estimate:
    """In per cent."""
    return _cell(value, interval, percent, percent_interval)


def _cell(
    value: float | None,
    interval: Interval | None,
    said: Callable[[float], str],
    interval_said: Callable[[float, float], str],
) -> Estimate:
    if value is None:
        return Estimate(DASH)
    return Estimate(said(value), interval_said(*interval) if interval else "")


def share_cells(found: Share | None) -> tuple[Cell, Cell]:
    """Counts, and the rate with its interval."""
    if found is None:
        return DASH, DASH
    return f"{found.count:,} of {found.rows:,}", rate_cell(found.value, found.interval)


def sources_tables(each: SetReport, mode: str) -> Iterator[Table]:
    """Malicious rows found and false alarms of each source; nothing for a set of one source."""
    shares = shares_by_source(each, mode)
    if len(shares) < 2:
        return
    rows = tuple(
        (source or "(unnamed)", *share_cells(of_class.get(Label.MALICIOUS)), *share_cells(of_class.get(Label.BENIGN)))
        for source, of_class in shares.items()
    )
    header = ("source", "found", "recall", "alarms", "false-alarm rate")
    drawn = f" (the figure shows the {MOST_SOURCES} largest)" if len(shares) > MOST_SOURCES else ""
    yield Table(f"{each.name}: each source in mode {mode} at the frozen threshold, with 95 % intervals{drawn}", header, rows)


def over_refusal_section(report: Report) -> Iterator[Section]:
    """Benign rows that are made to be flagged, wherever they stand."""
    found = list(over_refusal(report))
    if not found:
        return
    judges = [name for name in (*report.modes, *report.controls) if any(name in shares for _, _, shares in found)]
    rows = []
    for each, source, shares in found:
        cells = [rate_cell(shares[name].value, shares[name].interval) if name in shares else DASH for name in judges]
        place = each.name if source in ("", each.name) else f"{each.name} / {source}"
        rows.append((place, f"{next(iter(shares.values())).rows:,}", *cells))
    said = "Sources without a malicious row, and every benign row of over-refusal sets: the share that is flagged anyway."
    table = Table("False alarms on harmless texts, with 95 % intervals", ("set / source", "rows", *judges), tuple(rows))
    yield Section("False alarms where they hurt", (Paragraph(said), table))
