"""Attacks on a guard itself, with the normaliser and chunks each on and off.

    python benchmarks/attacks.py MODEL --out benchmarks/results/attacks.json [--mode off] [--chunk-tokens 256]

MODEL: a run folder, a model folder or a base model. Every attack and its clean twin is scored four times, at the guard's own
threshold.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import Progress

from guardtrain.environment import describe_environment
from guardtrain.evaluate.attacks import attack_table, load_attacks
from guardtrain.evaluate.runner import EvaluationMode
from guardtrain.inference.defences import defended_scorer
from guardtrain.inference.guards import load_guard


def main() -> None:
    """Score, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mode", choices=get_args(EvaluationMode), default="off")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--max-rows", type=int, help="only so many attacks, evenly drawn from the files, for a try")
    args = parser.parse_args()
    attacks = load_attacks()
    if args.max_rows:
        attacks = attacks[:: -(-len(attacks) // args.max_rows)]
    guard = load_guard(args.model)
    threshold = guard.settings.thresholds.get(args.mode, 0.0)
    total = 4 * sum(1 if attack.clean is None else 2 for attack in attacks)
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("attacks", total=total)
        table = attack_table(
            lambda normalise, chunk: defended_scorer(
                guard, normalise=normalise, chunk_tokens=args.chunk_tokens if chunk else None
            ),
            args.mode,
            threshold,
            attacks,
            on_row=lambda: progress.advance(task),
        )
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(),
        "guard": {"base_model": guard.settings.base_model, "mode": args.mode, "threshold": threshold},
        "chunk_tokens": args.chunk_tokens,
        "prompts_scored": total,
        "seconds": round(time.perf_counter() - start, 1),
        "table": table,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for row in table:
        print(json.dumps({"normalise": row["normalise"], "chunk": row["chunk"], **row["evasion"]["all"]}))


if __name__ == "__main__":
    main()
