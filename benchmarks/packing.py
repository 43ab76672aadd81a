"""How full packs get, and how long a million rows take to plan, on one core.

    python benchmarks/packing.py --shared ../shared --out benchmarks/results/packing.json

Rows in shuffled order, as guardtrain plans them, against rows in falling order (best fit decreasing, what TRL does): as full,
but whose packs hold rows of all lengths? `spread` is the standard deviation of a pack's mean row length, in tokens: what a
pack differs from its neighbours by.
"""

from __future__ import annotations

import argparse
import bisect
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from guardtrain.data.packing import Segment, plan_packs
from guardtrain.data.template import GuardTemplate
from guardtrain.environment import describe_environment
from guardtrain.model.load import load_tokenizer
from guardtrain.overrides import build_recipe
from guardtrain.train.rows import build_template, build_tree, load_rows
from guardtrain.train.stream import PackStream

BUDGETS = (1024, 2048, 4096, 8192)
MILLION = 1_000_000


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows, root_ids = real_trees(args.shared / "data")
    lengths = [len(row) for row in rows]
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(),
        "rows": len(rows),
        "policy_tokens": len(root_ids),
        "tokens_of_a_row": {"mean": round(float(np.mean(lengths)), 1), "longest": max(lengths)},
        "budgets": {str(budget): orders(lengths, len(root_ids), budget) for budget in BUDGETS},
        "a_million_rows": million(rows, root_ids),
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: results[key] for key in ("budgets", "a_million_rows")}, indent=1))


def real_trees(data: Path) -> tuple[list[Segment], list[int]]:
    """The row trees of all real prompts, both modes where there is a reason, and the policy's tokens."""
    train = {"path": str(data / "train.jsonl"), "reasons": str(data / "reasons.jsonl"), "exclude": str(data / "doubts.jsonl")}
    recipe = build_recipe({"data": {"train": [train], "max_prompt_tokens": 4096}}, [], name="packing", where="packing")
    template = build_template(load_tokenizer(recipe.model.name), recipe.task)
    assert isinstance(template, GuardTemplate)
    rows = load_rows(recipe, template).train
    return [build_tree(template, row, recipe.task.modes) for row in rows], template.policy_ids


def orders(lengths: list[int], policy_tokens: int, budget: int) -> dict[str, Any]:
    """Both orders at one budget."""
    room = budget - policy_tokens
    return {
        "shuffled": describe(plan_packs(lengths, room, seed=17), lengths, policy_tokens, budget),
        "falling": describe(best_fit_decreasing(lengths, room), lengths, policy_tokens, budget),
    }


def describe(packs: list[list[int]], lengths: list[int], policy_tokens: int, budget: int) -> dict[str, Any]:
    """Tokens in all packs divided by their budgets, and how unlike each other the packs are."""
    used = [policy_tokens + sum(lengths[row] for row in pack) for pack in packs]
    budgets = sum(max(budget, tokens) for tokens in used)  # a row that is longer has a pack of its own length
    means = [np.mean([lengths[row] for row in pack]) for pack in packs]
    return {"packs": len(packs), "fill": round(sum(used) / budgets, 4), "spread": round(float(np.std(means)), 1)}


def best_fit_decreasing(lengths: list[int], room: int) -> list[list[int]]:
    """The textbook's way, written to be read: the open packs by the room that they have left."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect.bisect_left(rooms, (lengths[row], -1))
        if place < len(rooms):
            left, pack = rooms.pop(place)
        else:
            left, pack = room, len(packs)
            packs.append([])
        packs[pack].append(row)
        bisect.insort(rooms, (left - lengths[row], pack))
    return packs


def million(rows: list[Segment], root_ids: list[int]) -> dict[str, Any]:
    """A million rows, drawn from the real ones: the plan alone, and the whole stream of one epoch for eight ranks."""
    drawn = [rows[index] for index in np.random.default_rng(17).integers(len(rows), size=MILLION)]
    start = time.perf_counter()
    lengths = [len(row) for row in drawn]
    measured = time.perf_counter()
    packs = plan_packs(lengths, 4096 - len(root_ids), num_packs_multiple=8, seed=17)
    planned = time.perf_counter()
    stream = PackStream(drawn, lambda epoch: range(MILLION), root_ids=root_ids, pack_tokens=4096, multiple=8, epochs=1, seed=17)
    streamed = time.perf_counter()
    return {
        "lengths_seconds": round(measured - start, 2),
        "plan_seconds": round(planned - measured, 2),
        "stream_seconds": round(streamed - planned, 2),
        **describe(packs, lengths, len(root_ids), 4096),
        "steps_of_eight_ranks": stream.num_steps,
    }


if __name__ == "__main__":
    main()
