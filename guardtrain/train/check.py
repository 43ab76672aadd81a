"""Whether the nodes of a run are fit for it: asked by `--check`, and by every run before it loads the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from guardtrain.config import Recipe
from guardtrain.distributed.checkpoint import checkpoints
from guardtrain.distributed.engine import launched_file, offloaded_bytes, read_file, zero_stage
from guardtrain.distributed.preflight import Facts, Finding, collect, exclude_line, judge
from guardtrain.distributed.ranks import barrier, gather, join, leave, main_first, together
from guardtrain.errors import DistributedError
from guardtrain.model.precision import Precision, choose_precision
from guardtrain.model.size import parameter_counts
from guardtrain.plan.host import checkpoint_bytes


def check_nodes(recipe: Recipe, *, console: Console) -> bool:
    """Show what the ranks of this launch found, and whether a run could start on them; every rank must call it."""
    ranks = join(timeout_seconds=recipe.distributed.timeout_seconds)
    precision = gather(choose_precision(recipe.model.dtype))[0]
    facts, findings = preflight(recipe, precision)
    if ranks.is_main:
        console.print(facts_table(facts))
        for finding in findings:
            console.print(f"{'bad' if finding.is_bad else 'warning'}: {finding}", markup=False, soft_wrap=True)
        if (line := exclude_line(findings)) is not None:
            console.print(f"sbatch {line}", markup=False)
    is_fit = not any(finding.is_bad for finding in findings)
    if ranks.is_main and is_fit:
        console.print("fit for this run")
    barrier()
    leave()
    return is_fit


def require_fit_nodes(recipe: Recipe, precision: Precision) -> list[str]:
    """Raise DistributedError on all ranks when a node is not fit for the run. Returns warnings, and what was measured."""
    facts, findings = preflight(recipe, precision)
    bad = [finding for finding in findings if finding.is_bad]
    if bad:
        hint = exclude_line(findings)
        together(lambda: _refuse("; ".join(map(str, bad)), hint))
    rate = facts[0].reduce_gib_per_second
    return [
        *(f"warning: {finding}" for finding in findings),
        *([] if rate is None else [f"the ranks sum up {rate:.2f} GiB of gradients a second"]),
    ]


def preflight(recipe: Recipe, precision: Precision) -> tuple[list[Facts], list[Finding]]:
    """The facts of all ranks and what stands out; every rank must call it, and all get the same. Raises ModelError."""
    trained, total = main_first(lambda: parameter_counts(recipe.model))
    facts = collect(Path(recipe.run_dir))
    file = launched_file()
    deepspeed = None if file is None else read_file(file)
    checkpoint = checkpoint_bytes(
        trained,
        total,
        is_adapter=recipe.model.method in {"lora", "qlora"},
        compute_bytes=precision.compute.itemsize,
        zero_stage=None if deepspeed is None else zero_stage(deepspeed),
    )
    pinned = 0 if deepspeed is None else offloaded_bytes(deepspeed, trained, total, precision.compute.itemsize) // len(facts)
    # The new one is whole before the oldest goes; those of a run that is resumed lie there already.
    lying_there = len(checkpoints(Path(recipe.run_dir) / "checkpoints"))
    copies = max(1, recipe.output.keep_checkpoints + 1 - lying_there)
    return facts, list(judge(facts, checkpoint_bytes=checkpoint, copies=copies, pinned_bytes=pinned))


def facts_table(facts: Sequence[Facts]) -> Table:
    """What every rank found, a row each."""
    table = Table("rank", "host", "devices", "free disk", "clock", "all-reduce", box=None, padding=(0, 2, 0, 0))
    for each in facts:
        rate = "" if each.reduce_gib_per_second is None else f"{each.reduce_gib_per_second:.2f} GiB/s"
        devices = ", ".join(f"{number} x {name}" for name, number in Counter(each.devices).items()) or "CPU"
        clock = f"{each.clock - facts[0].clock:+.1f} s"
        table.add_row(str(each.rank), each.host, devices, f"{each.free_bytes / 2**30:.1f} GiB", clock, rate)
    return table


def _refuse(found: str, hint: str | None) -> None:
    raise DistributedError("the nodes are not fit for this run", found=found, hint=hint)
