"""`guardtrain ladder`: the same rows under labels alone, under an engineered policy, and with reasons; what each step brought."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from guardtrain.config import ModelConfig, Recipe, Source
from guardtrain.data.sources import load_sources
from guardtrain.errors import ConfigError
from guardtrain.evaluate.bootstrap import with_intervals
from guardtrain.evaluate.report import evaluate_shown, figure
from guardtrain.evaluate.runner import Evaluation
from guardtrain.evaluate.scores import Interval, Measures
from guardtrain.overrides import load_recipe
from guardtrain.train.run import run
from guardtrain.types import GuardExample, Label

LABELS, ENGINEERED, REASONED = "labels alone, base model", "labels alone, engineered policy", "reasoned"
# Harmless rows that talk of prompts and instructions, near-identical to attacks: what a guard of words flags.
TRAP_SOURCE = "starter-hard"
TRAP_CATEGORIES = {"system_prompt_extraction", "instruction_override"}
TRAINED_BY_LABELS = {"modes": ("off",), "on_share": 1.0}


@dataclass(frozen=True)
class Rung:
    """One attempt in one mode on the held-out rows, thresholds at the recipe's target rate there. traps: share flagged."""

    attempt: str
    mode: str
    model: str
    folder: Path
    measures: Measures
    traps: float
    num_traps: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Figures for machines."""
        measures = self.measures.to_json()
        return {**dataclasses.asdict(self), "folder": str(self.folder), "measures": measures, "traps": round(self.traps, 4)}


def attempts(recipe: Recipe, base: str | None = None) -> dict[str, Recipe]:
    """The three recipes, which differ in model, policy and modes alone. base: the model of the first one.

    Raises ConfigError for a recipe that is no reasoned guard, or that trains on the traps.
    """
    if recipe.task.kind != "guard" or "on" not in recipe.task.modes:
        found = f"{recipe.task.kind}, {', '.join(recipe.task.modes)}"
        raise ConfigError("the ladder ends with a reasoned guard", where="task.modes", expected="off and on", found=found)
    if any(source.path == TRAP_SOURCE for source in recipe.data.train):
        raise ConfigError("the traps would be training rows", where="data.train", expected=f"no {TRAP_SOURCE}")
    policy = load_recipe("qwen3-0.6b-instruct-labels").task.policy
    first = dataclasses.replace(recipe.model, name=base, revision=None) if base else recipe.model
    return {
        LABELS: _attempt(recipe, "labels", model=first, task=TRAINED_BY_LABELS),
        ENGINEERED: _attempt(recipe, "engineered", model=recipe.model, task={**TRAINED_BY_LABELS, "policy": policy}),
        REASONED: _attempt(recipe, "reasoned", model=recipe.model, task={}),
    }


def _attempt(recipe: Recipe, name: str, *, model: ModelConfig, task: Mapping[str, Any]) -> Recipe:
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-{name}",
        model=model,
        task=dataclasses.replace(recipe.task, **task),
        output=dataclasses.replace(recipe.output, dir=str(Path(recipe.run_dir) / name)),
    )


def climb(recipe: Recipe, base: str | None = None, *, console: Console) -> list[Rung]:
    """Train and measure the three attempts one after the other, worst hope first; a run that is there already is refused."""
    traps = load_traps()
    rungs: list[Rung] = []
    for name, attempt in attempts(recipe, base).items():
        start = time.perf_counter()
        outcome = run(attempt, console=console)
        if outcome.guard is None or outcome.evaluation is None:
            break  # stopped by hand, or a rank that does not measure
        scorer, modes = outcome.guard.scorer(attempt.evaluate.pack_tokens), list(outcome.evaluation.measures)
        thresholds = outcome.summary["thresholds"]
        trapped = evaluate_shown("traps", scorer, traps, modes, thresholds=thresholds, console=console)
        seconds = time.perf_counter() - start
        rungs += [_rung(name, attempt, outcome.evaluation, trapped, mode, seconds) for mode in modes]
    return rungs


def load_traps() -> list[GuardExample]:
    """The harmless rows that a guard of words flags."""
    rows = load_sources([Source(path=TRAP_SOURCE)], "guard").examples
    guards = [row for row in rows if isinstance(row, GuardExample) and row.label is Label.BENIGN]
    return [row for row in guards if row.category in TRAP_CATEGORIES]


def _rung(name: str, attempt: Recipe, held_out: Evaluation, trapped: Evaluation, mode: Any, seconds: float) -> Rung:
    return Rung(
        attempt=name,
        mode=mode,
        model=attempt.model.name,
        folder=Path(attempt.run_dir),
        measures=with_intervals(held_out.judged(mode)),
        traps=trapped.measures[mode].flagged,
        num_traps=len(trapped.examples),
        seconds=seconds,
    )


def ladder_table(rungs: list[Rung]) -> Table:
    """One line for each attempt and mode."""
    title = f"The same rows three times; {rungs[0].measures.rows} held-out rows, {rungs[0].num_traps} harmless traps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("attempt", overflow="fold")
    for heading in ("mode", "flagged", "traps flagged", "AUROC", "recall at 1 % FPR", "minutes"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    last = ""
    for rung in rungs:
        recall = figure(rung.measures.recall_at_1_fpr) + _interval(rung.measures, "recall_at_1_fpr")
        minutes = f"{rung.seconds / 60:.1f}" if rung.attempt != last else ""
        figures = [f"{rung.measures.flagged:.0%}", f"{rung.traps:.0%}", figure(rung.measures.auroc), recall, minutes]
        table.add_row(rung.attempt if rung.attempt != last else "", rung.mode, *figures)
        last = rung.attempt
    return table


def _interval(measures: Measures, key: str) -> str:
    return f" ({measures.intervals[key][0]:.2f}–{measures.intervals[key][1]:.2f})" if key in measures.intervals else ""


def _bar(measures: Measures, key: str) -> tuple[float, Interval | None]:
    return getattr(measures, key) or 0.0, measures.intervals.get(key)


def write_ladder(rungs: list[Rung], folder: Path) -> None:
    """ladder.json and ladder.png beside the three runs."""
    (folder / "ladder.json").write_text(json.dumps([rung.to_json() for rung in rungs], indent=1) + "\n", encoding="utf-8")
    draw_ladder(rungs, folder / "ladder.png")


def draw_ladder(rungs: list[Rung], path: Path) -> None:
    """Three panels of bars, one bar for each attempt and mode, with 95 % intervals where there are some."""
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[float, Interval | None]]] = {
        "recall at 1 % FPR": [_bar(rung.measures, "recall_at_1_fpr") for rung in rungs],
        "harmless traps flagged": [(rung.traps, None) for rung in rungs],
        "flagged in all": [_bar(rung.measures, "flagged") for rung in rungs],
    }
    colours = dict(zip((LABELS, ENGINEERED, REASONED), ("#b0b0b0", "#7a9cc6", "#1f5a96"), strict=True))
    chart = Figure(figsize=(9, 0.7 + 0.42 * len(rungs)), layout="constrained")
    axes = chart.subplots(1, len(panels), sharey=True)
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        for place, (rung, (value, interval)) in enumerate(zip(rungs, bars, strict=True)):
            # Of a percentile interval the figure itself may be an end, or lie outside.
            error = [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]] if interval else None
            axis.barh(place, value, color=colours[rung.attempt], xerr=error, ecolor="#333333", capsize=2)
            axis.text(0.02, place, f"{value:.0%}", va="center", fontsize=8)
        axis.set(title=title, xlim=(0, 1), yticks=range(len(rungs)))
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticklabels([f"{rung.attempt}, {rung.mode}" for rung in rungs])
    axes[0].invert_yaxis()
    chart.savefig(path, dpi=150)
