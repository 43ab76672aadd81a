"""Step time of this project and of its peers: every contender in a process of its own, one after the other, then compared."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from guardtrain.bench.contenders import CONTENDERS, Record, Task, run_contender
from guardtrain.bench.work import build_work
from guardtrain.config import Recipe
from guardtrain.errors import ConfigError, GuardtrainError
from guardtrain.model.load import load_tokenizer
from guardtrain.model.precision import choose_precision
from guardtrain.overrides import dump_recipe, load_recipe

OURS, REFERENCE = "guardtrain", "trainer"
PADS = {"trl-padded", "trainer"}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """rows: how many of the recipe's rows make a step; policy_tokens: length of the shared policy, 0 for none, None as it is.

    steps, min_seconds: every contender trains at least so many steps and so long, the quick ones more steps.
    batch_sizes: every contender that pads is run with each; peer_pack_tokens: sequence length of peers that pack;
    peer_attention: transformers' name of how peers compute attention; peer_liger: whether Liger's kernels are put into them.
    """

    rows: int = 48
    steps: int = 3
    min_seconds: float = 0.0
    policy_tokens: int | None = None
    batch_sizes: tuple[int, ...] = (4,)
    peer_pack_tokens: int = 1024
    peer_attention: str = "sdpa"
    peer_liger: bool = False
    contenders: tuple[str, ...] = tuple(CONTENDERS)


def check_options(options: StepOptions) -> None:
    """Raise ConfigError for contenders that do not exist or are not installed, and for too few steps."""
    if unknown := sorted(set(options.contenders) - set(CONTENDERS)):
        raise ConfigError("no such contender", where="--contenders", expected=", ".join(CONTENDERS), found=", ".join(unknown))
    if any(name.startswith("trl") for name in options.contenders) and importlib.util.find_spec("trl") is None:
        raise ConfigError("not installed", where="--contenders", found="trl", hint="pip install trl, or leave its contenders out")
    if options.peer_liger and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("not installed", where="--peer-liger", found="liger-kernel", hint="pip install liger-kernel")
    if options.steps < 2:
        raise ConfigError("the first step only warms up", where="--steps", expected="at least 2", found=str(options.steps))


def bench_step(recipe: Recipe, options: StepOptions, *, console: Console) -> dict[str, Any]:
    """Run all contenders and compare: a dict of plain values. Raises GuardtrainError when a contender fails."""
    check_options(options)
    # Chosen once: every contender must compute in the same format.
    dtype = choose_precision(recipe.model.dtype).name
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype=dtype))
    work = build_work(recipe, load_tokenizer(recipe.model.name), num_rows=options.rows, policy_tokens=options.policy_tokens)
    samples = work.samples()
    results: dict[str, Any] = {
        "model": recipe.model.name,
        "method": recipe.model.method,
        "dtype": dtype,
        "modes": list(recipe.task.modes) if recipe.task.kind == "guard" else ["instruct"],
        "rows": len(work.rows),
        "samples_of_peers": len(samples),
        "policy_tokens": len(work.root_ids),
        "tokens": {
            "once": len(work.root_ids) + sum(map(len, work.rows)),
            "copied": sum(len(sample["input_ids"]) for sample in samples),
            "supervised": sum(label >= 0 for sample in samples for label in sample["labels"]),
        },
        "steps": options.steps,
        "min_seconds": options.min_seconds,
        "contenders": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for label, name, batch_size in _runs(options):
            with console.status(f"{label}: at least {options.steps} steps of {options.rows} rows"):
                record = _in_process(recipe, options, name, batch_size, Path(scratch) / f"{label}.pt")
            results["contenders"][label] = figures(record, options.rows)
        compare(results, {label: Path(scratch) / f"{label}.pt" for label in results["contenders"]})
    return results


def _runs(options: StepOptions) -> list[tuple[str, str, int]]:
    """(label, contender, batch size); those that pad run once for each batch size."""
    is_swept = len(options.batch_sizes) > 1
    runs = []
    for name in options.contenders:
        if name in PADS and is_swept:
            runs += [(f"{name}, {size} a batch", name, size) for size in options.batch_sizes]
        else:
            runs.append((name, name, options.batch_sizes[0]))
    return runs


def figures(record: Record, rows: int) -> dict[str, Any]:
    """Rates over all steps but the first."""
    step_seconds = sum(record.seconds[1:]) / len(record.seconds[1:])
    return {
        "settings": record.settings,
        "rows_per_second": round(rows / step_seconds, 3),
        "step_seconds": round(step_seconds, 3),
        "all_step_seconds": [round(seconds, 3) for seconds in record.seconds],
        "computed_tokens_of_a_step": record.tokens // len(record.seconds),
        "computed_tokens_per_second": round(record.tokens / len(record.seconds) / step_seconds, 1),
        "peak_mib": record.peak_mib,
        "losses": record.losses,
    }


def compare(results: dict[str, Any], gradients: dict[str, Path]) -> None:
    """Add to each contender what it has of ours and of the plain Trainer's: speed, loss curve, first gradient."""
    contenders = results["contenders"]
    reference = next((label for label in contenders if label.startswith(REFERENCE)), None)
    if reference is not None:
        expected = torch.load(gradients[reference], mmap=True)
        for label, figures in contenders.items():
            figures["gradient_error_against_trainer"] = gradient_error(torch.load(gradients[label], mmap=True), expected)
            pairs = zip(figures["losses"], contenders[reference]["losses"], strict=False)  # the steps that both have done
            figures["loss_error_against_trainer"] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    peers = {label: figures["rows_per_second"] for label, figures in contenders.items() if label != OURS}
    if OURS in contenders and peers:
        best = max(peers, key=peers.__getitem__)
        speedup = contenders[OURS]["rows_per_second"] / peers[best]
        # The other end of the noise: our mean against the fastest step that any peer did, its first one included.
        fastest = min(min(contenders[label]["all_step_seconds"]) for label in peers)
        speedups = {
            "speedup_over_best_peer": speedup,
            "speedup_over_fastest_peer_step": fastest / contenders[OURS]["step_seconds"],
        }
        results |= {"best_peer": best, **{name: round(value, 2) for name, value in speedups.items()}}


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over all parameters, divided by the norm of `expected`. Raises GuardtrainError on other names."""
    if found.keys() != expected.keys():
        different = ", ".join(sorted(found.keys() ^ expected.keys())[:3])
        raise GuardtrainError("two contenders trained different parameters", found=different)
    difference = sum(float((found[name] - value).double().pow(2).sum()) for name, value in expected.items())
    return float((difference / sum(float(value.double().pow(2).sum()) for value in expected.values())) ** 0.5)


def results_table(results: dict[str, Any]) -> Table:
    """One line for each contender."""
    title = (
        f"{results['rows']} rows a step, policy of {results['policy_tokens']} tokens, {'+'.join(results['modes'])}, "
        f"{results['method']}, {results['dtype']}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("contender")
    for heading in ("rows/s", "tokens/s", "peak MiB", f"loss at step {results['steps']}", "gradient off by"):
        table.add_column(heading, justify="right")
    for label, figures in results["contenders"].items():
        error = figures.get("gradient_error_against_trainer")
        table.add_row(
            label,
            f"{figures['rows_per_second']:.2f}",
            f"{figures['computed_tokens_per_second']:.0f}",
            str(figures["peak_mib"]),
            f"{figures['losses'][results['steps'] - 1]:.5f}",
            "" if error is None else f"{error:.1e}",
        )
    return table


def _in_process(recipe: Recipe, options: StepOptions, name: str, batch_size: int, gradient_file: Path) -> Record:
    """One contender's record, from a process of its own, so that its peak memory is its own too."""
    spec = {"options": asdict(options), "name": name, "batch_size": batch_size, "gradient_file": str(gradient_file)}
    with tempfile.TemporaryDirectory() as scratch:
        recipe_file, record_file = Path(scratch) / "recipe.yaml", Path(scratch) / "record.json"
        recipe_file.write_text(dump_recipe(recipe), encoding="utf-8")
        spec |= {"recipe": str(recipe_file), "record_file": str(record_file), "output_dir": scratch}
        command = [sys.executable, "-m", "guardtrain.bench.step", json.dumps(spec)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not record_file.is_file():
            said = done.stdout.strip().splitlines() or ["nothing said"]
            raise GuardtrainError("a contender failed", where=name, found=said[-1])
        return Record(**json.loads(record_file.read_text()))


def _main(spec: dict[str, Any]) -> None:
    """Run one contender in this process."""
    recipe, options = load_recipe(spec["recipe"]), StepOptions(**spec["options"])
    tokenizer = load_tokenizer(recipe.model.name)
    task = Task(
        recipe=recipe,
        work=build_work(recipe, tokenizer, num_rows=options.rows, policy_tokens=options.policy_tokens),
        tokenizer=tokenizer,
        dtype=choose_precision(recipe.model.dtype).compute,
        steps=options.steps,
        min_seconds=options.min_seconds,
        batch_size=spec["batch_size"],
        peer_pack_tokens=options.peer_pack_tokens,
        peer_attention=options.peer_attention,
        peer_liger=options.peer_liger,
        gradient_file=Path(spec["gradient_file"]),
        output_dir=spec["output_dir"],
    )
    Path(spec["record_file"]).write_text(json.dumps(asdict(run_contender(spec["name"], task))))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
