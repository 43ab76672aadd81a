"""A simulation, not a measurement: what the planner expects of a step on 1 to 256 H100s, term by term.

    python benchmarks/scaling.py --out benchmarks/results/scaling_simulated.json

Every weight of Llama 3.1 8B, 70B and 405B under ZeRO-3 with gradient checkpointing, one pack of 4,096 tokens on each GPU a step;
nodes of eight GPUs with NVLink, 3,200 Gbit/s between nodes. The formulas are `guardtrain/plan`'s, whose errors on CPUs are in
plan_cpu.json; on GPUs nothing of this was measured. Where a GPU's memory does not suffice the table says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from guardtrain.overrides import load_recipe
from guardtrain.plan.geometry import read_geometry
from guardtrain.plan.hardware import GIB, parse_cluster
from guardtrain.plan.search import as_asked
from guardtrain.plan.states import partition_elements
from guardtrain.plan.workload import workload_of

MODELS = ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b")
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROWS = 10_000


def main() -> None:
    """Plan every size, write the table and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    table = [row(model, gpus) for model in MODELS for gpus in GPUS]
    document = {
        "what": "a simulation by guardtrain/plan, not a measurement",
        "command": shlex.join(["python", *sys.argv]),
        "table": table,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    draw(table, args.out.with_suffix(".png"))
    for each in table:
        figures = f"{each['step_seconds']:8.2f} s {each['tokens_per_second_and_gpu']:7.0f} tokens/s and GPU"
        print(f"{each['model']:15s} {each['gpus']:4d} {figures}  {'fits' if each['fits'] else 'does not fit'}")


def row(model: str, gpus: int) -> dict[str, Any]:
    """One size of one model."""
    nodes, here = max(1, gpus // 8), min(gpus, 8)
    given = [
        f"model.name={model}",
        "model.method=full",
        "distributed.strategy=zero3",
        "train.pack_tokens=4096",
        f"train.packs_per_step={gpus}",
        "train.gradient_checkpointing=true",
    ]
    recipe, geometry = load_recipe("guard", given), read_geometry(model)
    found = as_asked(recipe, geometry, workload_of(recipe, rows=ROWS), parse_cluster(f"{nodes}x{here}xH100-80GB"))
    return {
        "model": model,
        "gpus": gpus,
        "parameters_a_gpu": partition_elements(geometry, gpus),
        "fits": found.problem is None,
        "gib_a_gpu": round(found.device_bytes / GIB, 1),
        "step_seconds": found.time.total,
        "terms": found.time.terms,
        "tokens_per_second_and_gpu": found.tokens_per_step / found.time.total / gpus,
        "rows_per_second": found.rows_per_second,
    }


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Seconds of a step by term, a panel for each model; sizes that do not fit are pale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    terms = list(dict.fromkeys(term for each in table for term in each["terms"]))
    figure, panels = plt.subplots(1, len(MODELS), figsize=(13, 4.2), layout="constrained")
    for panel, model in zip(panels, MODELS, strict=True):
        rows = [each for each in table if each["model"] == model]
        bottom = [0.0] * len(rows)
        for number, term in enumerate(terms):
            heights = [each["terms"].get(term, 0.0) for each in rows]
            bars = panel.bar([str(each["gpus"]) for each in rows], heights, bottom=bottom, color=f"C{number}", label=term)
            for bar, each in zip(bars, rows, strict=True):
                bar.set_alpha(1.0 if each["fits"] else 0.3)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        panel.set_title(model)
        panel.set_xlabel("H100s (pale: does not fit)")
    panels[0].set_ylabel("seconds of a step, simulated")
    handles, labels = panels[0].get_legend_handles_labels()
    for handle in handles:
        for bar in handle:
            bar.set_alpha(1.0)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
