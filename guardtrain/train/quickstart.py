"""`guardtrain quickstart`: the untuned model, a training run, the guard that comes out, side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from guardtrain.config import Recipe
from guardtrain.evaluate.report import evaluate_shown, measures_table
from guardtrain.evaluate.runner import Evaluation, scores_of
from guardtrain.inference.guards import load_guard
from guardtrain.train.finish import Outcome
from guardtrain.train.job import evaluation_modes
from guardtrain.train.rows import build_template, load_rows, measured_rows
from guardtrain.train.run import run
from guardtrain.types import Label, prompt_text


@dataclass(frozen=True)
class QuickstartReport:
    """before: the untuned model on the held-out rows; outcome: the run and the guard on the same rows."""

    before: Evaluation
    outcome: Outcome
    seconds: float
    samples: int

    @property
    def finished(self) -> bool:
        """False when Ctrl-C ended the run early."""
        return self.outcome.finished

    def to_json(self) -> dict[str, Any]:
        """Figures for machines."""
        return {"seconds": round(self.seconds, 1), "before": self.before.to_json(), "after": self.outcome.summary}

    def show(self, out: Console) -> None:
        """Before and after, sample verdicts, and what to do next."""
        after = self.outcome.evaluation
        if after is None:
            return
        title = f"Held-out starter rows ({len(after.examples)}, pairs kept together), {self.seconds / 60:.1f} minutes in all"
        out.print(measures_table({"before": self.before, "after": after}, title=title))
        out.print(sample_table(after, self.outcome.summary["thresholds"], self.samples))
        folder = self.outcome.folder.root
        out.print(Text(f"The guard is in {folder}/model. Try it on your own rows:\n  guardtrain evaluate {folder} FILE.jsonl"))
        out.print(Text("A longer run:\n  guardtrain quickstart train.epochs=3 data.max_rows=null --out runs/longer"))


def run_quickstart(recipe: Recipe, *, console: Console) -> QuickstartReport:
    """Measure the untuned model on the held-out rows, train, and measure again. Seconds include loading."""
    start = time.perf_counter()
    base = load_guard(recipe.model.name, policy=recipe.task.policy, revision=recipe.model.revision)
    rows = load_rows(recipe, build_template(base.tokenizer, recipe.task))
    held_out = measured_rows(rows, recipe.evaluate.max_rows, seed=recipe.data.seed)
    scorer = base.scorer(recipe.evaluate.pack_tokens)
    modes = evaluation_modes(recipe, rows.train)
    before = evaluate_shown("measure the untuned model", scorer, held_out, modes, console=console)
    del base, scorer
    outcome = run(recipe, console=console)
    return QuickstartReport(before, outcome, time.perf_counter() - start, recipe.evaluate.samples)


def sample_table(evaluation: Evaluation, thresholds: dict[str, float], count: int) -> Table:
    """Held-out rows with the guard's reason and verdict: whole pairs, in the rows' order."""
    mode = list(evaluation.measures)[-1]
    table = Table(title=f"Sample verdicts (mode {mode}; score less threshold)", title_justify="left", show_lines=True)
    for heading, ratio in (("prompt", 5), ("reason written by the guard", 5), ("verdict", 2), ("score", 1), ("label", 2)):
        table.add_column(heading, ratio=ratio)
    scores_N = scores_of(evaluation.scored, mode)
    for example, scored, score in list(zip(evaluation.examples, evaluation.scored, scores_N, strict=True))[:count]:
        verdict = Label.MALICIOUS if score >= thresholds[mode] else Label.BENIGN
        style = "green" if verdict == example.label else "red"
        # Text: rich would read square brackets in a prompt as markup.
        prompt, reason = Text(_shortened(prompt_text(example.prompt))), Text(scored.reason or "")
        table.add_row(prompt, reason, Text(verdict, style=style), f"{score - thresholds[mode]:+.1f}", Text(example.label))
    return table


def _shortened(text: str, length: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
