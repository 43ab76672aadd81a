"""A plan for people and for machines: tables, what to run, one JSON object."""

from __future__ import annotations

import math
import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from guardtrain.plan.hardware import GIB
from guardtrain.plan.host import checkpoint_bytes
from guardtrain.plan.search import METHODS, Candidate, Plan, best
from guardtrain.plan.states import trained_parameters

HOUR = 3600
# Of what is predicted, what a job asks for: hosts hold more than this counts, and queues end a job at its time.
MORE_MEMORY, MORE_TIME, START_HOURS = 1.1, 1.5, 1.0


def show(plan: Plan, arguments: list[str], *, console: Console, price: float | None) -> None:
    """Print the plan. arguments: the recipe's name and overrides as typed; price: of a GPU for an hour."""
    geometry = plan.geometry
    size = f"{geometry.parameters / 1e9:.3g} billion parameters"
    console.print(f"{geometry.name}, {size}, on {plan.cluster}; {plan.workload.said}", markup=False)
    stands = "fits" if plan.asked.problem is None else str(plan.asked.problem)
    console.print(f"the recipe as it stands ({plan.asked.setup.method}, {described(plan.asked)}): {stands}", markup=False)
    console.print()
    console.print(_table(plan))
    if plan.chosen is not None:
        _show_chosen(plan, plan.chosen, arguments, console=console, price=price)
        return
    console.print(f"\nnothing fits: method {plan.recipe.model.method} on {plan.cluster}", markup=False)
    if plan.nearest_cluster is not None:
        near = plan.nearest_cluster
        console.print(f"the nearest cluster that would: {near.cluster}, with {described(near)}", markup=False)
    if plan.nearest_method is not None:
        near = plan.nearest_method
        console.print(f"the nearest method that would: {near.setup.method}, with {described(near)}", markup=False)


def described(candidate: Candidate) -> str:
    """A candidate in a few words."""
    checkpointing = ", gradient checkpointing" if candidate.setup.gradient_checkpointing else ""
    return f"{candidate.strategy}, packs of {candidate.setup.pack.budget} tokens{checkpointing}"


def commands(plan: Plan, candidate: Candidate, arguments: list[str]) -> list[str]:
    """What to type: on one GPU, on one machine, and for several as a Slurm job and on hosts by hand."""
    line = ["guardtrain", "train", *arguments, *overrides(plan, candidate)]
    cluster = candidate.cluster
    if candidate.is_plain:
        return [shlex.join(line)]
    line[1] = "launch"
    line += ["--nodes", str(cluster.nodes), "--gpus-per-node", str(cluster.gpus_per_node)]
    if cluster.nodes == 1:
        return [shlex.join(line)]
    asked = [f"--sbatch={option}" for option in job_resources(plan, candidate)]
    return [shlex.join([*line, "--slurm", *asked]), shlex.join(line)]


def job_resources(plan: Plan, candidate: Candidate) -> list[str]:
    """Options of sbatch beside nodes and GPUs: memory of a node, and time as days-hours:minutes:seconds."""
    memory = math.ceil(candidate.host.total / GIB * MORE_MEMORY)
    minutes = math.ceil(60 * (hours(plan, candidate) * MORE_TIME + START_HOURS))
    return [f"--mem={memory}G", f"--time={minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"]


def overrides(plan: Plan, candidate: Candidate) -> list[str]:
    """What to change in the recipe, and only that."""
    train, model, setup = plan.recipe.train, plan.recipe.model, candidate.setup
    strategy = "auto" if candidate.strategy == "ddp" else candidate.strategy
    wanted = {
        "model.method": (model.method, setup.method),
        "distributed.strategy": (plan.recipe.distributed.strategy, strategy),
        "train.pack_tokens": (train.pack_tokens, setup.pack.budget),
        "train.packs_per_step": (train.packs_per_step, candidate.packs_per_step),
        "train.gradient_checkpointing": (train.gradient_checkpointing, setup.gradient_checkpointing),
    }
    return [f"{key}={str(new).lower()}" for key, (old, new) in wanted.items() if old != new]


def to_json(plan: Plan, arguments: list[str], *, price: float | None) -> dict[str, Any]:
    """Everything, for machines."""
    chosen = plan.chosen
    return {
        "recipe": plan.recipe.name,
        "model": plan.geometry.name,
        "parameters": plan.geometry.parameters,
        "cluster": str(plan.cluster),
        "workload": {
            "rows": plan.workload.rows,
            "row_tokens": round(plan.workload.row_tokens, 1),
            "policy_tokens": plan.workload.policy_tokens,
            "epochs": plan.workload.epochs,
            "from": plan.workload.said,
        },
        "as_asked": _candidate_json(plan, plan.asked, price),
        "chosen": None if chosen is None else _candidate_json(plan, chosen, price),
        "run": [] if chosen is None else commands(plan, chosen, arguments),
        "nearest_cluster": None if plan.nearest_cluster is None else _candidate_json(plan, plan.nearest_cluster, price),
        "nearest_method": None if plan.nearest_method is None else _candidate_json(plan, plan.nearest_method, price),
        "candidates": [_candidate_json(plan, each, price) for each in plan.candidates],
    }


def hours(plan: Plan, candidate: Candidate) -> float:
    """Of training, for all epochs of the recipe's rows."""
    return plan.workload.steps(candidate.setup.pack.budget, candidate.packs_per_step) * candidate.time.total / HOUR


def duration(hours: float) -> str:
    """For people."""
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"


def disk_bytes(plan: Plan, candidate: Candidate) -> tuple[int, int]:
    """(a checkpoint, the exported model)."""
    setup, total = candidate.setup, plan.geometry.parameters
    trained = trained_parameters(plan.geometry, setup)
    stage = None if setup.engine is None else setup.engine.stage
    whole = total + (trained if setup.is_adapter else 0)
    checkpoint = checkpoint_bytes(
        trained, whole, is_adapter=setup.is_adapter, compute_bytes=setup.compute_bytes, zero_stage=stage
    )
    exported = 4 * trained if setup.is_adapter else setup.weight_bytes * total
    return checkpoint, exported


def _candidate_json(plan: Plan, candidate: Candidate, price: float | None) -> dict[str, Any]:
    checkpoint, exported = disk_bytes(plan, candidate)
    spent = hours(plan, candidate)
    return {
        "cluster": str(candidate.cluster),
        "method": candidate.setup.method,
        "strategy": candidate.strategy,
        "gradient_checkpointing": candidate.setup.gradient_checkpointing,
        "pack_tokens": candidate.setup.pack.budget,
        "packs_per_step": candidate.packs_per_step,
        "fits": candidate.problem is None,
        "problem": None if candidate.problem is None else str(candidate.problem),
        "gpu_bytes": round(candidate.device_bytes),
        "peak": {"moment": candidate.peak.name, **{kind: round(size) for kind, size in candidate.peak.parts.items()}},
        "reserved_bytes": round(candidate.reserved_bytes),
        "host_bytes": round(candidate.host.total),
        "checkpoint_bytes": checkpoint,
        "export_bytes": exported,
        "step_seconds": candidate.time.total,
        "step_terms": candidate.time.terms,
        "rows_per_second": candidate.rows_per_second,
        "tokens_per_second": candidate.tokens_per_step / candidate.time.total,
        "hours": spent,
        **({} if price is None else {"cost": spent * candidate.cluster.ranks * price}),
    }


def _table(plan: Plan) -> Table:
    table = Table("", "method", "strategy", "ckpt", box=None, padding=(0, 1, 0, 0))
    for name in ("pack", "GiB/GPU", "GiB/host", "s/step", "rows/s", "in all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for candidate in _shown(plan):
        _add(table, plan, candidate)
    return table


def _shown(plan: Plan) -> list[Candidate]:
    """Of the recipe's method the best of each strategy, or where none fits the smallest; of each other method the best."""
    wanted, shown = plan.recipe.model.method, []
    for strategy in dict.fromkeys(each.strategy for each in plan.candidates):
        same = [each for each in plan.candidates if (each.setup.method, each.strategy) == (wanted, strategy)]
        if same:
            shown.append(best(same) or min(same, key=lambda each: each.device_bytes))
    others = [best([each for each in plan.candidates if each.setup.method == other]) for other in METHODS if other != wanted]
    return shown + [each for each in others if each is not None]


def _add(table: Table, plan: Plan, candidate: Candidate) -> None:
    setup = candidate.setup
    table.add_row(
        "*" if candidate is plan.chosen else "",
        setup.method,
        candidate.strategy,
        "yes" if setup.gradient_checkpointing else "no",
        str(setup.pack.budget),
        f"{candidate.device_bytes / GIB:.1f}",
        f"{candidate.host.total / GIB:.0f}",
        f"{candidate.time.total:.2f}",
        f"{candidate.rows_per_second:.1f}",
        duration(hours(plan, candidate)),
        "yes" if candidate.problem is None else f"no: {candidate.problem.kind}",
        style=None if candidate.problem is None else "dim",
    )


def _show_chosen(plan: Plan, chosen: Candidate, arguments: list[str], *, console: Console, price: float | None) -> None:
    table = Table(f"memory of a GPU, at the {chosen.peak.name}", "GiB", "time of a step", "s", box=None, padding=(0, 2, 0, 0))
    parts = [*chosen.peak.parts.items(), ("context and fragmentation", chosen.reserved_bytes)]
    memory = [(kind, f"{size / GIB:.2f}") for kind, size in parts if size]
    time = [(term, f"{seconds:.3f}") for term, seconds in chosen.time.terms.items()]
    for row in range(max(len(memory), len(time))):
        table.add_row(*(memory[row] if row < len(memory) else ("", "")), *(time[row] if row < len(time) else ("", "")))
    console.print()
    console.print(table)
    checkpoint, exported = disk_bytes(plan, chosen)
    console.print(f"\ndisk: {checkpoint / GIB:.1f} GiB a checkpoint, {exported / GIB:.1f} GiB the model", markup=False)
    tokens = f"{chosen.tokens_per_step / chosen.time.total:,.0f} tokens/s"
    console.print(f"time: {duration(hours(plan, chosen))} for {plan.workload.epochs:g} epochs, {tokens}", markup=False)
    if price is not None:
        cost = hours(plan, chosen) * chosen.cluster.ranks * price
        console.print(f"money: {cost:,.2f} at {price:g} a GPU and hour", markup=False)
    for command in commands(plan, chosen, arguments):
        console.print(f"run: {command}", markup=False, soft_wrap=True)
