"""Step time beside TRL and the plain Trainer, on real prompts: one mode, both modes, policies of 0 to 700 tokens, chats.

    python benchmarks/step_time.py --shared ../shared --out benchmarks/results/step_time_cpu.json

Every point is one `guardtrain bench step`: the same rows, model, optimiser and dtype for all contenders, one process each.
Points are appended as they come; a picture is drawn beside the file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from guardtrain.bench.step import StepOptions, bench_step, results_table
from guardtrain.config import Source
from guardtrain.data.sources import load_sources
from guardtrain.environment import describe_environment
from guardtrain.overrides import build_recipe
from guardtrain.types import GuardExample, prompt_text

TURNS_OF_A_CHAT = 4
PACK_TOKENS = 4096


@dataclass(frozen=True)
class Point:
    """One comparison. rows: of a step, as many as a peer trains in a few minutes on two cores."""

    rows: int
    policy_tokens: int
    overrides: tuple[str, ...] = ()


DUAL = ("task.modes=[off, on]",)
POINTS = {
    "both modes, policy 200": Point(32, 200, DUAL),
    "on, policy 200": Point(32, 200, ("task.modes=[on]",)),
    "off, policy 200": Point(32, 200, ("task.modes=[off]",)),
    "both modes, policy 700": Point(16, 700, DUAL),
    "both modes, no policy": Point(32, 0, DUAL),
    "chat": Point(12, 0, ("task.kind=instruct",)),
    "both modes, policy 75": Point(32, 75, DUAL),
}


def main() -> None:
    """Run the chosen points one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of the real data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", help="names separated by semicolons; all of them if not given")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--min-seconds", type=float, default=100.0, help="the quick contenders do more steps")
    parser.add_argument("--batch-sizes", default="4")
    parser.add_argument("--set", action="append", default=[], help="an override for every point: model.dtype=bfloat16")
    args = parser.parse_args()
    names = [name.strip() for name in args.points.split(";")] if args.points else list(POINTS)
    if unknown := [name for name in names if name not in POINTS]:
        parser.error(f"unknown points {unknown}, expected some of {list(POINTS)}")
    sizes = tuple(int(size) for size in args.batch_sizes.split(","))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        reasoned = real_rows(args.shared / "data")
        guards, chats = write_guards(reasoned, Path(scratch)), write_chats(reasoned, Path(scratch))
        for name in names:
            point = POINTS[name]
            data = chats if name == "chat" else guards
            tree = {
                "model": {"dtype": "float32"},
                "data": {"train": [data], "max_prompt_tokens": 4096},
                "train": {"pack_tokens": PACK_TOKENS},
            }
            recipe = build_recipe(tree, [*point.overrides, *args.set], name="step-time", where="step-time")
            options = StepOptions(
                rows=point.rows,
                steps=args.steps,
                min_seconds=args.min_seconds,
                policy_tokens=point.policy_tokens,
                batch_sizes=sizes,
            )
            results = bench_step(recipe, options, console=console)
            console.print(results_table(results), results.get("speedup_over_best_peer"))
            append_point(args.out, {"point": name, **results})
            plot(args.out)


def real_rows(data: Path) -> list[GuardExample]:
    """The real prompts that have a reason."""
    source = Source(path=str(data / "train.jsonl"), reasons=str(data / "reasons.jsonl"), exclude=str(data / "doubts.jsonl"))
    return [row for row in load_sources([source], "guard").examples if isinstance(row, GuardExample) and row.reason]


def write_guards(reasoned: list[GuardExample], scratch: Path) -> str:
    """The rows as a file: every point draws from the same rows, in whatever modes."""
    path = scratch / "guards.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in reasoned:
            fields = {"prompt": prompt_text(row.prompt), "label": row.label.value, "reason": row.reason}
            file.write(json.dumps(fields) + "\n")
    return str(path)


def write_chats(reasoned: list[GuardExample], scratch: Path) -> str:
    """Ordinary conversations out of real rows: the prompts as user turns, the reasons as answers, a few of them in each."""
    path = scratch / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(reasoned) - TURNS_OF_A_CHAT, TURNS_OF_A_CHAT):
            messages = []
            for row in reasoned[start : start + TURNS_OF_A_CHAT]:
                messages += [{"role": "user", "content": prompt_text(row.prompt)}, {"role": "assistant", "content": row.reason}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def append_point(path: Path, point: dict[str, Any]) -> None:
    """Add one point to the results file, in the place of an older one of its name."""
    environment = describe_environment()
    results = json.loads(path.read_text()) if path.exists() else {"environment": environment, "points": []}
    point |= {"date": environment["date"], "command": shlex.join(["python", *sys.argv])}
    results["points"] = [old for old in results["points"] if old["point"] != point["point"]] + [point]
    path.write_text(json.dumps(results, indent=1) + "\n")


def plot(path: Path) -> None:
    """Rows per second of every contender at every point, each group in units of its best peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(path.read_text())
    points = [point for name in POINTS for point in results["points"] if point["point"] == name]
    contenders = list(dict.fromkeys(label for point in points for label in point["contenders"]))
    figure, axes = plt.subplots(figsize=(10, 0.8 * len(points) + 1.6), layout="constrained")
    height = 0.8 / len(contenders)
    for number, label in enumerate(contenders):
        found = [(row, point) for row, point in enumerate(points) if label in point["contenders"]]
        best = [point["contenders"][point["best_peer"]]["rows_per_second"] for _, point in found]
        rates = [point["contenders"][label]["rows_per_second"] for _, point in found]
        bars = axes.barh(
            [row + number * height for row, _ in found],
            [rate / reference for rate, reference in zip(rates, best, strict=True)],
            height,
            label=label,
            color=["#c2410c", "#94a3b8", "#64748b", "#cbd5e1"][number % 4],
        )
        ratios = [f"{bar.get_width():.1f}x, {rate:.2f} rows/s" for bar, rate in zip(bars, rates, strict=True)]
        background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line of the best peer
        axes.bar_label(bars, ratios, padding=4, fontsize=8, bbox=background)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(points))], [point["point"] for point in points])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.2)
    axes.set_xlabel("rows per second, in units of the best peer")
    first = points[0]
    where = results["environment"]["gpu"] or f"{results['environment']['cores']} CPU cores"
    axes.set_title(f"Training speed, {first['model']}, {first['method']}, {first['dtype']}, {where}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
