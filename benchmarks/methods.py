"""Training speed and memory of every tuning method on this machine: full, freeze, LoRA, QLoRA, in float32 and bfloat16.

    python benchmarks/methods.py --out benchmarks/results/methods.json

Each point is a recipe on the same starter rows, run in a process of its own, so that peak memory is its own too. The
ratio to full tuning in float32 is what carries over to other machines.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import describe_environment
from rich.console import Console

from guardtrain.overrides import build_recipe
from guardtrain.train.run import run

REFERENCE = "full float32"
POINTS = {
    f"{method} {dtype}": [f"model.method={method}", f"model.dtype={dtype}"]
    for dtype in ("float32", "bfloat16")
    for method in ("full", "freeze", "lora", "qlora")
}


def main() -> None:
    """Start one process for each point, collect, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--point", choices=POINTS, help="run only this one, in this process, and print it")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(run_point(args.point, args.steps)))
        return
    if args.out is None:
        parser.error("--out is needed")
    points = {name: in_process(name, args.steps) for name in POINTS}
    for figures in points.values():
        figures["speed_against_full_float32"] = round(figures["tokens_per_second"] / points[REFERENCE]["tokens_per_second"], 2)
    results = {"command": " ".join(["python", *sys.argv]), "environment": describe_environment(), "points": points}
    args.out.write_text(json.dumps(results, indent=1) + "\n")


def in_process(name: str, steps: int) -> dict[str, Any]:
    """One point's figures, from its own process."""
    command = [sys.executable, __file__, "--point", name, "--steps", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    Console(stderr=True).print(name, figures)
    return figures


def run_point(name: str, steps: int) -> dict[str, Any]:
    """Train `steps` packs. Peak memory is that of the whole process, model loading included."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = {
            "data": {"train": ["starter"]},
            "train": {"max_steps": steps, "watch_steps": 0, "save_steps": 100_000},
            "evaluate": {"modes": ["off"], "max_rows": 2},
            "output": {"dir": str(Path(scratch) / "run")},
        }
        outcome = run(build_recipe(tree, POINTS[name], name="methods", where="methods"), console=Console(stderr=True))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    keys = ("steps", "computed_tokens", "train_seconds", "tokens_per_second", "compute_dtype")
    return {**{key: outcome.summary[key] for key in keys}, "peak_process_mib": round(peak_mib)}


if __name__ == "__main__":
    main()
