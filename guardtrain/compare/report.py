"""A comparison on disk: for people as HTML and Markdown with pictures, for machines as JSON. No prompt and no answer is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guardtrain.compare import findings
from guardtrain.compare.controls import CONTROLS, MLLR, ORDINARY, UNTUNED
from guardtrain.compare.findings import Difference, Line, Models
from guardtrain.compare.measure import MEASURES
from guardtrain.compare.statistics import Estimate as Figure
from guardtrain.compare.study import Outcome
from guardtrain.environment import describe_environment
from guardtrain.evaluate.reporting.document import (
    Block,
    Cell,
    Document,
    Estimate,
    Facts,
    Paragraph,
    Pictures,
    Section,
    Table,
    Warned,
)
from guardtrain.evaluate.reporting.html import render_html
from guardtrain.evaluate.reporting.markdown import render_markdown
from guardtrain.evaluate.reporting.text import (
    DASH,
    count,
    decimal,
    decimal_interval,
    percent,
    percent_interval,
    points,
    seconds,
)

FILES = ("report.html", "report.md", "report.json", "differences.png")
INTERVALS = (
    "Intervals are 95 %, over seeds and items (requests, prompts, rows) at once: every model saw every item, and both count as "
    "draws from more of their kind. Differences are paired by seed and item."
)
ON_TERMINAL = ("harmful", "refused", "probe", "loss")
EQUAL = {True: "equal", False: "not equal", None: DASH}
SAID = {"better": "better", "worse": "worse", "unknown": "cannot be told"}


def write_report(outcome: Outcome, folder: Path, command: str) -> None:
    """Write report.html, report.md, report.json and differences.png into `folder`."""
    from guardtrain.compare.pictures import differences_png

    shown = document(outcome, command)
    tree = json.dumps(report_json(outcome, command), indent=1, allow_nan=False) + "\n"
    for name, text in zip(FILES, (render_html(shown), render_markdown(shown), tree), strict=False):
        partial = folder / f"tmp-{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)
    differences_png(outcome.models, folder / FILES[-1])


def document(outcome: Outcome, command: str) -> Document:
    """The whole report."""
    recipe = outcome.study.recipe
    return Document(
        status=findings.verdict(outcome.models),
        title=f"Secure tuning compared: {recipe.name} on {recipe.model.name}",
        sections=(
            _summary(outcome),
            Section("Every way of tuning", (_table(outcome.models), _pictures(outcome))),
            Section("Differences", _difference_tables(outcome.models)),
            Section("What was compared", (Facts(tuple((name, CONTROLS[name].said) for name in outcome.models)),)),
            Section("How it was measured", (_measured(outcome, command), Paragraph(INTERVALS), *_search(outcome))),
        ),
    )


def report_json(outcome: Outcome, command: str) -> dict[str, Any]:
    """Every figure; values by item are in the folder `measured`."""
    models = outcome.models
    deciding = findings.deciding(models)
    return {
        "verdict": findings.verdict(models),
        "decided_by": deciding.to_json() if deciding else None,
        "warnings": warnings_of(outcome),
        "controls": [line.to_json() for line in findings.lines_of(models)],
        "differences": [each.to_json() for pair in _pairs(models) for each in findings.differences_of(models, *pair)],
        "matched_rates": {
            name: [
                {"seed": model.seed, "rate_factor": model.rate_factor, "tried": [list(each) for each in model.tried]}
                for model in each
            ]
            for name, each in models.items()
            if CONTROLS[name].is_matched
        },
        "update_norms": {
            name: [model.norms.to_json() if model.norms else None for model in each] for name, each in models.items()
        },
        "judge": outcome.judge.name,
        "judge_is_a_model": outcome.judge.is_model,
        "judge_on_plain_refusals": outcome.harmful_refusals,
        "requests": {"harmful": outcome.requests.by_source, "harmless": len(outcome.requests.harmless)},
        "seeds": list(outcome.study.seeds),
        "settings": dict(outcome.settings),
        "environment": describe_environment(),
        "command": command,
        "seconds": round(sum(model.seconds for each in models.values() for model in each), 1),
    }


def _summary(outcome: Outcome) -> Section:
    blocks: list[Block] = [Paragraph(findings.verdict(outcome.models))]
    if warned := warnings_of(outcome):
        blocks.append(Warned(tuple(warned)))
    return Section("In short", tuple(blocks))


def warnings_of(outcome: Outcome) -> list[str]:
    """What the reader should know before trusting a figure."""
    judge = outcome.judge
    return findings.warnings(outcome.models, judge=judge.name, is_model=judge.is_model, harmful_refusals=outcome.harmful_refusals)


def _table(models: Models) -> Table:
    measures = findings.measures_of(models)
    header = ("way of tuning", *(MEASURES[name].said for name in measures), "task score", "update", "rate")
    notes = "; ".join(f"{MEASURES[name].said}: {MEASURES[name].note}" for name in measures)
    caption = f"Means over seeds. {notes}. Update: its norm as a share of the weights'; rate: times the recipe's."
    rows = tuple(_row(line, measures) for line in findings.lines_of(models))
    return Table(caption, header, rows, text_columns=frozenset({len(measures) + 1}))


def shown_table(outcome: Outcome) -> Any:
    """The table for a terminal: fewer columns than the report's."""
    from rich import box
    from rich.table import Table as RichTable

    shown = [name for name in ON_TERMINAL if name in findings.measures_of(outcome.models)]
    table = RichTable(title=f"Judge: {outcome.judge.name}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("way of tuning", overflow="fold")
    for name in (*(MEASURES[name].said for name in shown), "task score", "update"):
        table.add_column(name, justify="right")
    for line in findings.lines_of(outcome.models):
        cells = [_cell(line.figures[name], is_share=_is_share(name)) for name in shown]
        score = "reference" if line.control == ORDINARY else EQUAL[line.is_equal]
        update = _cell(line.update, is_share=True, digits=3).value if line.update else DASH
        table.add_row(line.control, *(f"{cell.value} {cell.interval}".rstrip() for cell in cells), score, update)
    return table


def _row(line: Line, measures: list[str]) -> tuple[Cell, ...]:
    score = "reference" if line.control == ORDINARY else EQUAL[line.is_equal]
    rate = DASH if line.control == UNTUNED else f"{line.rate_factor:.3g}"
    update = _cell(line.update, is_share=True, digits=3) if line.update else DASH
    return (line.control, *(_cell(line.figures[name], is_share=_is_share(name)) for name in measures), score, update, rate)


def _is_share(measure: str) -> bool:
    return MEASURES[measure].unit == "share"


def _cell(figure: Figure, *, is_share: bool, digits: int = 1) -> Estimate:
    interval = figure.interval
    if not is_share:
        return Estimate(decimal(figure.mean), decimal_interval(*interval) if interval else "")
    value = percent(figure.mean) if digits == 1 else f"{100 * figure.mean:.{digits}f} %"
    return Estimate(value, percent_interval(*interval) if interval and digits == 1 else "")


def _pairs(models: Models) -> list[tuple[str, str]]:
    """What is compared with what: mllr with its rivals first, then every control with the ordinary tune and the untuned model."""
    rivals = [(MLLR, other) for other in findings.RIVALS if other in models and MLLR in models]
    tunes = [name for name in models if name != UNTUNED]
    before = [(name, UNTUNED) for name in tunes if UNTUNED in models]
    return [*rivals, *((name, ORDINARY) for name in tunes if name != ORDINARY), *before]


def _difference_tables(models: Models) -> tuple[Table, ...]:
    header = ("way of tuning", "less", "in", "difference", "it is")
    tables = []
    for caption, others, measures in (
        ("ML-LR against what must not be as good", findings.RIVALS, tuple(MEASURES)),
        ("Every way of tuning against the ordinary tune", (ORDINARY,), tuple(MEASURES)),
        ("What tuning did to the model's safety, proxy drift among it", (UNTUNED,), findings.SAFETY),
    ):
        found = [each for pair in _pairs(models) if pair[1] in others for each in findings.differences_of(models, *pair)]
        rows = tuple(_difference_row(each) for each in found if each.measure in measures)
        if rows:
            tables.append(Table(caption, header, rows, text_columns=frozenset({1, 2, 4})))
    return tuple(tables)


def _difference_row(each: Difference) -> tuple[Cell, ...]:
    interval, is_share = each.found.interval, _is_share(each.measure)
    value = points(each.found.mean) if is_share else f"{each.found.mean:+.3f}".replace("-", "−")
    ends = "" if interval is None else percent_interval(*interval) if is_share else decimal_interval(*interval)
    return (each.one, each.other, MEASURES[each.measure].said, Estimate(value, ends), SAID[each.answer])


def _pictures(outcome: Outcome) -> Pictures:
    from guardtrain.compare.pictures import differences_picture, robustness_picture

    modules = outcome.modules
    return Pictures((differences_picture(outcome.models), *([robustness_picture(modules)] if modules else [])))


def _measured(outcome: Outcome, command: str) -> Facts:
    study, environment = outcome.study, describe_environment()
    recipe, requests = study.recipe, outcome.requests
    sources = ", ".join(f"{number} of {name}" for name, number in requests.by_source.items())
    took = sum(model.seconds for each in outcome.models.values() for model in each)
    return Facts(
        (
            ("model and method", f"{recipe.model.name}, {recipe.model.method}, learning rate {recipe.train.learning_rate:g}"),
            ("seeds", f"{', '.join(map(str, study.seeds))}: the order of rows and whatever is drawn; held-out rows are the same"),
            ("harmful requests", f"{sources}; {count(len(requests.harmless), 'harmless twin')}"),
            ("judge", outcome.judge.name),
            ("answers", f"greedy, at most {study.answer_tokens} tokens"),
            ("machine", f"{environment['cpu']}, {environment['gpu'] or 'no GPU'}, {environment['date']}"),
            ("time", seconds(took)),
            ("command", command),
        )
    )


def _search(outcome: Outcome) -> tuple[Block, ...]:
    modules = outcome.modules
    if modules is None:
        return ()
    return (
        Paragraph(
            f"{len(modules.robust)} of {len(modules.units)} modules are robust together: a joint drop of "
            f"{modules.joint_drop:.3f}, at most {modules.tau:g}, disturbed with strength {modules.strength:.3g} "
            f"(search of {modules.made}).",
            lead="Robust modules.",
        ),
    )
