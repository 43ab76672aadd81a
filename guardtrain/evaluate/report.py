"""Evaluations as tables for people and files for machines. Prompts and reasons never go into either."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from guardtrain.evaluate.runner import Evaluation, EvaluationMode, evaluate
from guardtrain.inference.scorer import Scorer
from guardtrain.types import GuardExample

COLUMNS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "recall_at_1_fpr": "recall at 1 % FPR",
    "recall_at_5_fpr": "recall at 5 % FPR",
    "flagged": "flagged",
    "false_positive_rate": "false alarms",
}


def evaluate_shown(
    title: str,
    scorer: Scorer,
    examples: Sequence[GuardExample],
    modes: Sequence[EvaluationMode],
    *,
    thresholds: Mapping[str, float] | None = None,
    console: Console,
) -> Evaluation:
    """`evaluate` under a progress bar that is gone when it is done."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=len(examples))
        return evaluate(scorer, examples, modes, thresholds=thresholds, on_row=lambda: progress.advance(task))


def measures_table(evaluations: Mapping[str, Evaluation], title: str | None = None) -> Table:
    """One line for each set and mode; a lone set names the table. F1, flagged and false alarms are at the guard's threshold."""
    is_lone = len(evaluations) == 1
    # No lines between columns: all of them fit a terminal of 80 characters, where a figure must never be shortened.
    title = next(iter(evaluations)) if is_lone and title is None else title
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    if not is_lone:
        table.add_column("set", overflow="fold")
    for heading in ("mode", "rows"):
        table.add_column(heading, min_width=len(heading))
    for heading in (*COLUMNS.values(), "no verdict"):
        table.add_column(heading, justify="right", min_width=max(map(len, ("0.000", *heading.split()))))
    for name, evaluation in evaluations.items():
        for number, (mode, measures) in enumerate(evaluation.measures.items()):
            figures = [figure(getattr(measures, key)) for key in COLUMNS]
            cells = [mode, str(measures.rows), *figures, str(measures.parse_failures)]
            table.add_row(*([] if is_lone else ["" if number else name]), *cells)
    return table


def figure(value: float | None) -> str:
    """Three digits; a dash where a set lacks the rows for it."""
    return "–" if value is None else f"{value:.3f}"


def write_scores(evaluation: Evaluation, path: Path) -> None:
    """Write one JSON line for each row: id, where, source, label, the score of each mode, whether the reason was cut."""
    with path.open("w", encoding="utf-8") as file:
        for example, scored in zip(evaluation.examples, evaluation.scored, strict=True):
            line = {
                "id": example.id,
                "where": example.where,
                "source": example.source,
                "label": example.label,
                "scores": {mode: round(score, 6) for mode, score in scored.scores.items()},
                "truncated": scored.truncated,
            }
            file.write(json.dumps(line) + "\n")
