"""A guard from real prompts, end to end, against TF-IDF and logistic regression on the same rows.

    python benchmarks/real_data.py --shared ../shared --out benchmarks/results/real_data.json [KEY=VALUE …]

Trains on train.jsonl joined with reasons.jsonl (doubted labels left out; rows without a reason train mode off only) and
measures on dev.jsonl: the random split, whose sources are those of training. The same as

    guardtrain train guard data.train=… data.validation=…
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from guardtrain.config import Recipe
from guardtrain.data.template import GuardTemplate
from guardtrain.environment import describe_environment
from guardtrain.evaluate.baseline import tfidf_scores
from guardtrain.evaluate.files import evaluate_files, flagged_by_source
from guardtrain.evaluate.scores import measure
from guardtrain.model.load import load_tokenizer
from guardtrain.overrides import build_recipe, recipe_to_tree
from guardtrain.train.rows import build_stream, build_template, load_rows
from guardtrain.train.run import run
from guardtrain.types import GuardExample, Label


def main() -> None:
    """Train, measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="for example train.max_steps=150")
    args = parser.parse_args()
    recipe = real_recipe(args.shared / "data", args.overrides)
    outcome = run(recipe, console=Console(stderr=True))
    assert outcome.evaluation is not None
    seen, everything, test = rows_of(recipe)
    twins = evaluate_files(str(outcome.folder.root), ["starter-hard"], ["off"], console=Console(stderr=True))
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(),
        "recipe": recipe_to_tree(recipe),
        "rows_seen_in_training": len(seen),
        "guard": outcome.summary,
        "tfidf_same_rows": baseline(seen, test),
        "tfidf_rows_of_the_recipe": {"training_rows": len(everything), **baseline(everything, test)},
        "flagged_by_source": flagged_by_source(outcome.evaluation),
        "near_identical_twins": twins.to_json(),
    }
    results["guard_loses_to_tfidf_on_the_same_rows_in"] = losses(results)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(
        json.dumps(
            {key: results[key] for key in ("guard", "tfidf_same_rows", "guard_loses_to_tfidf_on_the_same_rows_in")}, indent=1
        )
    )


def real_recipe(data: Path, overrides: list[str]) -> Recipe:
    """The recipe `guard` on the real data."""
    train = {"path": str(data / "train.jsonl"), "reasons": str(data / "reasons.jsonl"), "exclude": str(data / "doubts.jsonl")}
    tree = {
        "task": {"kind": "guard", "verdict_weight": 10},
        "data": {"train": [train], "validation": [str(data / "dev.jsonl")], "max_prompt_tokens": 4096},
        "train": {"learning_rate": 1e-4, "epochs": 1, "save_steps": 100},
        "evaluate": {"pack_tokens": 2048},
        "output": {"dir": "runs/real-data", "overwrite": True},
    }
    return build_recipe(tree, overrides, name="real-data", where="real-data")


def rows_of(recipe: Recipe) -> tuple[list[GuardExample], list[GuardExample], list[GuardExample]]:
    """Rows that the steps of the run really saw, all training rows, test rows. The stream is the run's own: seeded."""
    template = build_template(load_tokenizer(recipe.model.name), recipe.task)
    assert isinstance(template, GuardTemplate)
    rows = load_rows(recipe, template)
    stream = build_stream(recipe, template, rows, world_size=1)
    seen = {index for pack in stream.packs for index in pack}
    guard_rows = [row for row in rows.train if isinstance(row, GuardExample)]
    test = [row for row in rows.validation if isinstance(row, GuardExample)]
    return [guard_rows[index] for index in sorted(seen)], guard_rows, test


def baseline(train: list[GuardExample], test: list[GuardExample]) -> dict[str, Any]:
    """The measures of TF-IDF and logistic regression."""
    is_malicious = np.array([row.label is Label.MALICIOUS for row in test])
    return measure(tfidf_scores(train, test), is_malicious).to_json()


def losses(results: dict[str, Any]) -> list[str]:
    """Where the baseline on the same rows is ahead of the guard."""
    keys = ("auroc", "auprc", "recall_at_1_fpr", "recall_at_5_fpr")
    modes = results["guard"]["held_out"]["modes"]
    return [
        f"{mode} {key}: {figures[key]:.3f} against {results['tfidf_same_rows'][key]:.3f}"
        for mode, figures in modes.items()
        for key in keys
        if figures[key] < results["tfidf_same_rows"][key]
    ]


if __name__ == "__main__":
    main()
