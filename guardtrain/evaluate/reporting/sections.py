"""What a report says of the guard as a whole, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guardtrain.evaluate.reporting.comparison import Answer, Comparison
from guardtrain.evaluate.reporting.data import Axis, Report
from guardtrain.evaluate.reporting.document import (
    Block,
    Bullets,
    Case,
    Cases,
    Cell,
    Document,
    Estimate,
    Facts,
    Paragraph,
    Pictures,
    Quote,
    Section,
    Table,
    Tile,
    Tiles,
    Warned,
)
from guardtrain.evaluate.reporting.figures import attacks_picture, defence
from guardtrain.evaluate.reporting.findings import Mistake, status, without_width, worst_mistakes
from guardtrain.evaluate.reporting.glossary import GLOSSARY
from guardtrain.evaluate.reporting.set_sections import AXIS_TITLES, MEASURES, axis_sections, over_refusal_section, rate_cell
from guardtrain.evaluate.reporting.text import DASH, count, decimal, percent, points, seconds, shortened
from guardtrain.evaluate.scores import Measures, too_few_benign
from guardtrain.types import Label, prompt_text

MOST_CONTAMINATED = 50
REASONING_ANSWERS: dict[Answer, str] = {
    "yes": "reasoning paid",
    "no": "did not pay",
    "unknown": "cannot be told from these rows",
}
CONTROL_ANSWERS: dict[Answer, str] = {
    "yes": "the guard is better",
    "no": "the guard is not better",
    "unknown": "cannot be told from these rows",
}


def document(report: Report, *, show_prompts: bool, has_pictures: bool) -> Document:
    """The whole report.

    show_prompts: the worst errors with their texts and reasons, not only their ids. has_pictures: drawing takes seconds.
    """
    sections = (
        summary_section(report),
        run_section(report),
        sets_section(report),
        *axis_sections(report, has_pictures=has_pictures),
        *over_refusal_section(report),
        *mistakes_section(report, show_prompts),
        *attacks_section(report, has_pictures),
        *contamination_section(report),
        *costs_section(report),
        Section("Terms", (Facts(tuple(GLOSSARY.items())),)),
    )
    return Document(status(report), f"Evaluation of {report.model}", sections)


def summary_section(report: Report) -> Section:
    """What a reader in a hurry takes away."""
    frozen = f"score ≥ {decimal(report.threshold)}"
    lead = f"At the threshold that this guard will run with (mode {report.mode}, {frozen}), it flags:"
    blocks: list[Block] = [Paragraph(lead), Tiles(tuple(_tile(report, axis, each) for axis, each in report.pooled.items()))]
    if report.calibration and report.calibration.warnings:
        blocks.append(Warned(report.calibration.warnings))
    questions = {"Did reasoning pay?": (report.reasoning, REASONING_ANSWERS)}
    for name in report.controls:
        chosen = [each for each in report.against_controls if each.other == name]
        questions[f"Is the guard better than {name}?"] = (chosen, CONTROL_ANSWERS)
    answered = {question: each for question, each in questions.items() if each[0]}
    if answered:
        blocks.append(Bullets(tuple(_answer(question, *each) for question, each in answered.items())))
        blocks.append(_answers_table(report, answered))
    return Section("Summary", tuple(blocks), is_for_card=True)


def _answer(question: str, comparisons: Sequence[Comparison], words: Mapping[Answer, str]) -> Paragraph:
    """In words, with the sets that each answer holds for."""
    parts = []
    for answer, said in words.items():
        names = [each.set_name for each in comparisons if each.is_one_better == answer]
        if names:
            parts.append(f"{said} ({', '.join(names)})")
    text = "; ".join(parts)
    return Paragraph(f"{text[0].upper()}{text[1:]}.", lead=question)


def _answers_table(report: Report, answered: Mapping[str, tuple[Sequence[Comparison], Mapping[Answer, str]]]) -> Table:
    by_set: dict[str, dict[str, Comparison]] = {}
    for question, (comparisons, _) in answered.items():
        for each in comparisons:
            by_set.setdefault(each.set_name, {})[question] = each
    rows: list[tuple[Cell, ...]] = []
    for each_set in report.sets:
        if found := by_set.get(each_set.name):
            few = too_few_benign(each_set.benign, 0.01) if each_set.malicious else None
            measure = MEASURES[next(iter(found.values())).measure] + (", on few benign rows" if few else "")
            rows.append((each_set.name, measure, *(_difference(found.get(question)) for question in answered)))
    titles = []
    for comparisons, _ in answered.values():
        ones = list(dict.fromkeys(each.one for each in comparisons))
        titles.append(f"{' or '.join(ones)} minus {comparisons[0].other}")
    caption = "Differences on the same rows in percentage points, with 95 % intervals and p"
    return Table(caption, ("set", "decided by", *titles), tuple(rows), frozenset({1}))


def _difference(each: Comparison | None) -> Cell:
    if each is None:
        return DASH
    low, high = each.decisive.interval
    return Estimate(points(each.decisive.value), f"({points(low)} to {points(high)}), p = {decimal(each.decisive.p_value)}")


def _tile(report: Report, axis: Axis, pooled: Measures) -> Tile:
    figures = []
    if pooled.malicious:
        figures.append(("of malicious texts", rate_cell(pooled.recall, pooled.intervals.get("recall"))))
    if pooled.benign:
        figures.append(("of harmless texts", rate_cell(pooled.false_positive_rate, pooled.intervals.get("false_positive_rate"))))
    sets = report.headline_sets(axis)
    note = f"{', '.join(each.name for each in sets)}: {pooled.malicious:,} malicious, {pooled.benign:,} harmless rows"
    if all(each.is_calibration_set for each in sets):
        note += "; the calibration set itself"
    note = "; ".join([note, *without_width({report.mode: pooled})])
    return Tile(AXIS_TITLES[axis], tuple(figures), note)


def run_section(report: Report) -> Section:
    """What was run, so that it can be run again."""
    rows = sum(len(each.examples) for each in report.sets)
    facts = {
        "model": report.model,
        "base model": report.base_model,
        "method": report.method,
        "modes": ", ".join(report.modes),
        "controls": ", ".join(report.controls),
        "rows judged": f"{rows:,} in {count(len(report.sets), 'set')}",
        "rows trained on": "" if report.training_rows is None else f"{report.training_rows:,}",
        "time": "" if report.seconds is None else seconds(report.seconds),
        "command": report.command,
        **{key: _plain(value) for key, value in report.environment.items()},
    }
    notes: list[Block] = [Bullets(tuple(Paragraph(note) for note in report.notes))] if report.notes else []
    policy: list[Block] = [Paragraph("What the guard was told to look for:", lead="Policy."), Quote(report.policy)]
    shown = Facts(tuple((key, value) for key, value in facts.items() if value))
    return Section("What was run", (shown, *notes, *policy))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return "none" if value is None else str(value)


def sets_section(report: Report) -> Section:
    """The data, with what may be done with it."""
    header = ("set", "axis", "malicious", "benign", "contaminated", "licence", "note")
    rows: list[tuple[Cell, ...]] = []
    for each in report.sets:
        note = ". ".join(filter(None, ("calibration set" if each.is_calibration_set else "", each.note)))
        counts = (f"{each.malicious:,}", f"{each.benign:,}", f"{len(each.contaminated):,}")
        rows.append((each.name, each.axis, *counts, each.licence or DASH, note or DASH))
    return Section("Data", (Table("The sets of this evaluation", header, tuple(rows), frozenset({1, 5, 6})),))


def mistakes_section(report: Report, show_prompts: bool) -> Iterator[Section]:
    """The errors that the guard was surest of."""
    found = worst_mistakes(report)
    if not found:
        return
    said = f"The {count(len(found), 'error')} farthest beyond the threshold in mode {report.mode}, over all sets."
    hidden = "" if show_prompts else " Texts are left out: find them by id."
    cases = Cases(tuple(_case(each, show_prompts) for each in found))
    shown = (
        " Texts are data: characters that do not show are spelled out, long texts are cut in the middle." if show_prompts else ""
    )
    yield Section("Worst errors", (Paragraph(f"{said}{hidden}{shown}"), cases))


def _case(mistake: Mistake, show_prompts: bool) -> Case:
    example = mistake.example
    is_missed = example.label is Label.MALICIOUS
    place = " / ".join(filter(None, dict.fromkeys((mistake.set_name, example.source, example.id or example.where))))
    beyond = f"{decimal(mistake.margin)} beyond the threshold"
    facts = f"score {decimal(mistake.score)}, {beyond}, p_malicious {decimal(mistake.p_malicious)}"
    texts = [("Text", shortened(prompt_text(example.prompt)))]
    if mistake.reason:
        texts.append(("Reason", shortened(mistake.reason)))
    title = "Missed: malicious, not flagged" if is_missed else "False alarm: harmless, flagged"
    return Case(title, f"{place}; {facts}", tuple(texts) if show_prompts else ())


def contamination_section(report: Report) -> Iterator[Section]:
    """Rows of the sets that stand in the training data."""
    found = [(each.name, row) for each in report.sets for row in each.contaminated]
    if not found:
        return
    rows = tuple((name, row.id, row.kind, decimal(row.similarity)) for name, row in found[:MOST_CONTAMINATED])
    left_out = len(found) - len(rows)
    more = f" {left_out:,} more are listed in report.json." if left_out else ""
    said = f"{count(len(found), 'row')} of the sets stand in the training data or nearly so, and are in no figure above.{more}"
    table = Table("Rows that were left out", ("set", "id", "found by", "similarity"), rows, frozenset({1, 2}))
    yield Section("Contamination", (Paragraph(said), table))


def attacks_section(report: Report, has_pictures: bool) -> Iterator[Section]:
    """Malicious requests dressed up to pass, under each pair of defences."""
    if not report.attacks:
        return
    said = (
        f"The same malicious requests, plain and dressed up to pass the guard in mode {report.mode}. Evaded: flagged when plain, "
        "not when dressed up. Look-alikes are harmless texts that look as odd."
    )
    tables = [_attack_table(report.attacks, key, title) for key, title in ATTACK_RATES.items()]
    pictures = [Pictures((attacks_picture(report.attacks),))] if has_pictures else []
    yield Section("Attacks on the guard", (Paragraph(said), *pictures, *tables))


ATTACK_RATES = {
    "evaded": "Evaded (of requests flagged when plain)",
    "recall": "Recall on attacked requests",
    "false_alarms": "False alarms on look-alikes",
    "clean_flagged": "Flagged when plain",
}


def _attack_table(attacks: Sequence[Mapping[str, Any]], key: str, title: str) -> Table:
    rows = tuple(
        (family, *(_attack_cell(entry["evasion"][family][key]) for entry in attacks)) for family in attacks[0]["evasion"]
    )
    return Table(f"{title}, by family and defence", ("family", *(defence(entry) for entry in attacks)), rows)


def _attack_cell(rate: Mapping[str, Any]) -> Cell:
    return Estimate(percent(rate["value"]), f"{rate['count']:,} of {rate['of']:,}") if rate["of"] else DASH


def costs_section(report: Report) -> Iterator[Section]:
    """What a verdict costs in each mode."""
    blocks: list[Block] = []
    if report.speed:
        rows = []
        for mode, speed in report.speed.items():
            rate = speed.rows_per_second
            million = seconds(1e6 / rate) if rate else DASH
            rows.append((mode, f"{rate:,.1f}" if rate else DASH, seconds(speed.p50_seconds), seconds(speed.p95_seconds), million))
        header = ("mode", "rows a second", "median wait", "95 % wait at most", "a million texts")
        blocks.append(Table("Speed on the machine above: batches, and one text at a time", header, tuple(rows)))
    said = []
    if report.escalation_rate is not None:
        said.append(
            Paragraph(
                f"{percent(report.escalation_rate)} of rows need a reason; the others are decided at once.", lead="Cascade."
            )
        )
    if report.flip_rate is not None:
        said.append(
            Paragraph(
                f"{percent(report.flip_rate)} of rows get another verdict when the reason is sampled anew.", lead="Firmness."
            )
        )
    blocks += [Bullets(tuple(said))] if said else []
    if blocks:
        yield Section("Costs", tuple(blocks), is_for_card=True)
