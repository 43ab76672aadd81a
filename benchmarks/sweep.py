"""Which levers make a better guard: label-only against dual mode, verdict weight, epochs, learning rate, LoRA.

    python benchmarks/sweep.py unseen  --shared ../shared --out benchmarks/results/sweep_unseen_sources.json
    python benchmarks/sweep.py starter --out benchmarks/results/sweep_starter.json

`unseen` trains on real rows of some sources and measures on dev rows of eight other sources and, as trap, on the
benign rows of `starter-hard` (harmless texts full of trigger words). `starter` trains and measures on the starter pairs.
Every point is one recipe run by the same code as `guardtrain train`; results are appended as they come.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from guardtrain.config import Source
from guardtrain.data.sources import load_sources
from guardtrain.data.splits import balanced_subset, split_validation
from guardtrain.environment import describe_environment
from guardtrain.evaluate.baseline import tfidf_scores
from guardtrain.evaluate.runner import evaluate, scores_of
from guardtrain.evaluate.scores import measure
from guardtrain.overrides import build_recipe
from guardtrain.train.run import run
from guardtrain.types import GuardExample, Label, prompt_text

UNSEEN_SOURCES = {
    "cyberseceval_mitre",
    "cyberseceval_mitre_frr",
    "injecagent_enhanced",
    "bipia_email_benign",
    "pyrit_jailbreak_templates",
    "harmbench_text_val",
    "self_instruct",
    "tau2_reasons",
}
MAX_PROMPT_CHARACTERS = 1200  # keeps a point under ten minutes on two cores

STARTER = "+starter"  # a point with this mark trains on the starter pairs as well
FASTER = "train.learning_rate=2e-4"
X10, X30 = "task.verdict_weight=10", "task.verdict_weight=30"
LABEL_ONLY = ("task.modes=[off]", "task.verdict_weight=1")
QUARTER_ON = "task.on_share=0.25"
UNSEEN_POINTS: dict[str, list[str]] = {
    "label-only": [*LABEL_ONLY],
    "label-only, 2e-4": [*LABEL_ONLY, FASTER],
    "dual, every token alike": ["task.verdict_weight=1"],
    "dual, verdict x10": [X10],
    "dual, verdict x30": [X30],
    "dual, verdict x10, 2e-4": [X10, FASTER],
    "dual, verdict x10, 2e-4, 2 epochs": [X10, FASTER, "train.epochs=2"],
    "a quarter on, verdict x10, 2e-4": [QUARTER_ON, X10, FASTER],
    "a quarter on, verdict x10, 2e-4, starter pairs too": [QUARTER_ON, X10, FASTER, STARTER],
    "label-only, 2e-4, starter pairs too": [*LABEL_ONLY, FASTER, STARTER],
    "LoRA r16, a quarter on, verdict x10, 1e-3": [QUARTER_ON, X10, "model.method=lora", "train.learning_rate=1e-3"],
}
# As many rows as each method trains in about the time of the quickstart.
QUICKSTART = [X10, "train.learning_rate=3e-4", "train.pack_tokens=768"]
STARTER_POINTS: dict[str, list[str]] = {
    "full, 500 rows, all on": [*QUICKSTART, "data.max_rows=500"],
    "full, 700 rows, a quarter on": [*QUICKSTART, QUARTER_ON, "data.max_rows=700"],
    "upper half, 950 rows, a quarter on": [
        *QUICKSTART,
        QUARTER_ON,
        "data.max_rows=950",
        "model.method=freeze",
        "model.trained_layers=15",
    ],
    "LoRA r16, 900 rows, a quarter on, 1e-3": [
        *QUICKSTART,
        QUARTER_ON,
        "data.max_rows=900",
        "model.method=lora",
        "train.learning_rate=1e-3",
    ],
}
POINTS = {"unseen": UNSEEN_POINTS, "starter": STARTER_POINTS}


def main() -> None:
    """Run the chosen points one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(POINTS))
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of the real data (unseen)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", help="names separated by semicolons; all of them if not given")
    parser.add_argument("--set", action="append", default=[], help="an override for every point, for example train.epochs=1")
    args = parser.parse_args()
    points = POINTS[args.data]
    names = [name.strip() for name in args.points.split(";")] if args.points else list(points)
    if unknown := [name for name in names if name not in points]:
        parser.error(f"unknown points {unknown}, expected some of {list(points)}")
    with tempfile.TemporaryDirectory() as scratch:
        train, test, traps = split_unseen(args.shared / "data") if args.data == "unseen" else split_starter()
        for name in names:
            point = run_point(name, [*args.set, *points[name]], train, test, traps, Path(scratch))
            append_point(args.out, {"data": args.data}, {**point, "date": describe_environment()["date"]})
            print(json.dumps(point), flush=True)


def split_unseen(data: Path) -> tuple[list[GuardExample], list[GuardExample], list[GuardExample]]:
    """Rows with reasons of seen sources and half as many without; dev rows of unseen sources; benign starter rows."""
    source = Source(path=str(data / "train.jsonl"), reasons=str(data / "reasons.jsonl"), exclude=str(data / "doubts.jsonl"))
    seen = [row for row in short_rows(source) if row.source not in UNSEEN_SOURCES]
    with_reason = [row for row in seen if row.reason]
    without = balanced_subset([row for row in seen if not row.reason], len(with_reason) // 2, seed=17)
    test = [row for row in short_rows(Source(path=str(data / "dev.jsonl"))) if row.source in UNSEEN_SOURCES]
    twins = balanced_subset(list(short_rows(Source(path="starter-hard"))), 300, seed=17)
    traps = [row for row in twins if row.label is Label.BENIGN]
    if not all((with_reason, without, test, traps)):
        raise SystemExit("a part of the sweep's data is empty")
    return with_reason + without, test, traps


def split_starter() -> tuple[list[GuardExample], list[GuardExample], list[GuardExample]]:
    """The quickstart's own split, all rows; the traps are the held-out benign twins."""
    train, test = split_validation(load_sources([Source(path="starter")], "guard").examples, 0.15, 17)
    rows = [row for row in test if isinstance(row, GuardExample)]
    return [row for row in train if isinstance(row, GuardExample)], rows, [row for row in rows if row.label is Label.BENIGN]


def short_rows(source: Source) -> Iterator[GuardExample]:
    """Rows whose prompt is short enough for the sweep."""
    for row in load_sources([source], "guard").examples:
        if isinstance(row, GuardExample) and len(prompt_text(row.prompt)) <= MAX_PROMPT_CHARACTERS:
            yield row


def run_point(
    name: str, overrides: list[str], train: list[GuardExample], test: list[GuardExample], traps: list[GuardExample], scratch: Path
) -> dict[str, Any]:
    """Train one point and measure it on the test rows and the traps (flagged at score 0, no threshold fitted)."""
    more = load_sources([Source(path="starter")], "guard").examples if STARTER in overrides else []
    train = [*train, *(row for row in more if isinstance(row, GuardExample))]
    tree = {
        "data": {"train": [write_rows(train, scratch / "train.jsonl")], "validation": [write_rows(test, scratch / "test.jsonl")]},
        "train": {"epochs": 1, "watch_steps": 0, "save_steps": 100_000},
        "evaluate": {"pack_tokens": 2048},
        "output": {"dir": str(scratch / "run"), "overwrite": True},
    }
    settings = [override for override in overrides if override != STARTER]
    outcome = run(build_recipe(tree, settings, name="sweep", where="sweep"), console=Console(stderr=True))
    assert outcome.guard is not None
    scorer = outcome.guard.scorer(pack_tokens=2048)
    modes = list(outcome.evaluation.measures) if outcome.evaluation else []
    # A trap set has one class, which `evaluate` refuses: one malicious row is added and left out of the figure.
    trapped = evaluate(scorer, [*traps, next(row for row in test if row.label is Label.MALICIOUS)], modes)
    flagged = {mode: round(float((scores_of(trapped.scored[:-1], mode) > 0).mean()), 4) for mode in modes}
    figures = {"traps": len(traps), "traps_flagged": flagged, "baseline": baseline(train, test, traps)}
    return {"point": name, "overrides": overrides, **figures, **outcome.summary}


def baseline(train: list[GuardExample], test: list[GuardExample], traps: list[GuardExample]) -> dict[str, Any]:
    """TF-IDF and logistic regression on the same rows."""
    is_malicious = np.array([row.label is Label.MALICIOUS for row in test])
    figures = measure(tfidf_scores(train, test), is_malicious).to_json()
    return {**figures, "traps_flagged": round(float((tfidf_scores(train, traps) > 0).mean()), 4)}


def write_rows(rows: Iterable[GuardExample], path: Path) -> str:
    """Write rows for a recipe to read; into a scratch folder only."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            turns = [{"role": turn.role, "content": turn.content} for turn in row.prompt]
            fields = {"id": row.id, "source": row.source, "pair": row.pair, "label": row.label, "reason": row.reason}
            file.write(json.dumps({**fields, "prompt": turns}) + "\n")
    return str(path)


def append_point(path: Path, header: dict[str, Any], point: dict[str, Any]) -> None:
    """Add one point to the results file."""
    results = json.loads(path.read_text()) if path.exists() else {**header, "environment": describe_environment(), "points": []}
    results["points"] = [old for old in results["points"] if old["point"] != point["point"]] + [point]
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
