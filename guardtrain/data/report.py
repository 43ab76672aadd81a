"""`guardtrain data check`: read files, check them, and show what is wrong, grouped by cause."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from guardtrain.config import Source
from guardtrain.data.checks import check_examples
from guardtrain.data.keys import label_of
from guardtrain.data.problems import Cause, Problem, errors_of
from guardtrain.data.sources import Kind, load_sources
from guardtrain.types import GuardExample

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN_PER_CAUSE = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a check found. rows, labels, sources and reasons count the rows that could be read."""

    rows: int
    labels: Mapping[str, int]
    sources: Mapping[str, int]
    reasons: int
    problems: Sequence[Problem]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: no errors (warnings allowed). 2: at least one error."""
        return 2 if errors_of(self.problems) else 0

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; every problem, not the first 20 of a cause."""
        return {
            "ok": self.exit_code == 0,
            "rows": self.rows,
            "labels": dict(self.labels),
            "sources": dict(self.sources),
            "reasons": self.reasons,
            "errors": len(errors_of(self.problems)),
            "warnings": len(self.problems) - len(errors_of(self.problems)),
            "notes": list(self.notes),
            "problems": [problem.to_json() for problem in self.problems],
        }


def check_files(
    paths: Sequence[str],
    *,
    kind: Kind = "guard",
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    reasons: str | None = None,
    exclude: str | None = None,
    max_prompt_tokens: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> CheckReport:
    """Read `paths` (anything a Source may name) and check all their rows as one set.

    columns, labels, reasons, exclude: as in a recipe's source, for every path.
    count_tokens: without it the token budget is not checked, and a note says so.
    """
    sources = [
        Source(path=path, columns=dict(columns or {}), labels=dict(labels or {}), reasons=reasons, exclude=exclude)
        for path in paths
    ]
    loaded = load_sources(sources, kind)
    notes = list(loaded.notes)
    if max_prompt_tokens is None or count_tokens is None:
        notes.append("the token budget was not checked: it takes a tokenizer")
    checked = check_examples(loaded.examples, max_prompt_tokens=max_prompt_tokens, count_tokens=count_tokens)
    guard = [example for example in loaded.examples if isinstance(example, GuardExample)]
    return CheckReport(
        rows=len(loaded.examples),
        labels=Counter(label_of(example) for example in guard),
        sources=Counter(example.source for example in loaded.examples),
        reasons=sum(example.reason is not None for example in guard),
        problems=[*loaded.problems, *checked],
        notes=notes,
    )


def show_report(report: CheckReport, out: Console, shown: int = SHOWN_PER_CAUSE) -> None:
    """A summary, for each cause its count and its first `shown` problems, and the notes."""
    out.print(_summary(report), markup=False, highlight=False)
    if report.problems:
        out.print(_problem_table(report.problems, shown))
    else:
        out.print("no problems found")
    for note in report.notes:
        out.print(f"note: {printable(note)}", markup=False)


def _problem_table(problems: Sequence[Problem], shown: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=False)
    for heading in ("severity", "cause", "count", "where", "what"):
        table.add_column(heading, justify="right" if heading == "count" else "left", overflow="fold")
    for cause, found in by_cause(problems):
        style = "red" if found[0].severity == "error" else "yellow"
        head = [Text(found[0].severity, style=style), Text(cause), Text(f"{len(found):,}")]
        for problem in found[:shown]:
            # Text, because rich reads brackets in a plain string as markup, and ids and file names may hold them.
            table.add_row(*head, Text(printable(problem.where)), Text(printable(_what(problem))))
            head = [Text(""), Text(""), Text("")]
        if len(found) > shown:
            table.add_row("", "", "", "", Text(f"… and {len(found) - shown:,} more (--json lists all)", style="dim"))
    return table


def by_cause(problems: Sequence[Problem]) -> list[tuple[Cause, list[Problem]]]:
    """Problems in groups, errors first, then in the order of `Cause`."""
    groups = [(cause, [problem for problem in problems if problem.cause == cause]) for cause in Cause]
    return sorted(((cause, found) for cause, found in groups if found), key=lambda group: group[1][0].severity)


def printable(text: str) -> str:
    """`text` with control characters spelled out: an id from a hostile file must not drive the terminal."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", lambda match: f"\\x{ord(match.group()):02x}", text
    )


def _summary(report: CheckReport) -> str:
    classes = ", ".join(f"{count:,} {label}" for label, count in sorted(report.labels.items()))
    errors = len(errors_of(report.problems))
    counts = f"{report.rows:,} rows" + (f" ({classes}; {report.reasons:,} with a reason)" if classes else "")
    return f"{counts}: {errors:,} errors, {len(report.problems) - errors:,} warnings"


def _what(problem: Problem) -> str:
    return f"{problem.what} [id {problem.row_id}]" if problem.row_id else problem.what
