"""Training speed and memory of every tuning method on this machine: full, freeze, LoRA, QLoRA, in float32 and bfloat16.

    python benchmarks/methods.py --out benchmarks/results/methods.json

Each point is a recipe on the same starter rows, run in a process of its own, so that peak memory is its own too. The
ratio to full tuning in float32 is what carries over to other machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from guardtrain.environment import describe_environment
from guardtrain.overrides import build_recipe
from guardtrain.train.job import build_job
from guardtrain.train.trainer import PackTrainer

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
    """Train `steps` packs and nothing else: no checkpoint, no evaluation. Peak memory includes loading the model."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = {
            "data": {"train": ["starter"]},
            "train": {"max_steps": steps},
            "output": {"dir": str(Path(scratch) / "run")},
        }
        job = build_job(build_recipe(tree, POINTS[name], name="methods", where="methods"))
        arguments = dataclasses.replace(job.arguments, save_strategy="no")
        trainer = PackTrainer(
            model=job.model, args=arguments, train_dataset=job.stream, data_collator=job.collator, keep_checkpoints=2
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {
        "packs": steps,
        "computed_tokens": trainer.computed_tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(trainer.computed_tokens / seconds, 1),
        "peak_process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


if __name__ == "__main__":
    main()
