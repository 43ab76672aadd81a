"""`guardtrain bench`: each command parses, calls and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from guardtrain.errors import ConfigError
from guardtrain.options import AsJson, Overrides, check_writable, numbers
from guardtrain.terminal import output, print_json, start

bench_app = typer.Typer(no_args_is_help=True, help="Measure this project beside its peers, and this machine for the planner.")


@bench_app.command("step")
def bench_step_time(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file: its rows, model and method.")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of one step.")] = 48,
    steps: Annotated[int, typer.Option(min=2, help="Steps at least; the first warms up.")] = 3,
    min_seconds: Annotated[float, typer.Option(min=0, help="Every contender trains at least so long.")] = 0,
    policy_tokens: Annotated[int | None, typer.Option(min=0, help="Length of the shared policy; 0 for none.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="For contenders that pad; each is tried.")] = "4",
    peer_pack_tokens: Annotated[int, typer.Option(min=1, help="Sequence length of peers that pack.")] = 1024,
    peer_attention: Annotated[str, typer.Option(help="How peers compute attention: sdpa, flex_attention …")] = "sdpa",
    peer_liger: Annotated[bool, typer.Option("--peer-liger", help="Put Liger's kernels into the peers (GPU).")] = False,
    contenders: Annotated[str | None, typer.Option(help="guardtrain,trl-padded,trl-packed,trainer or some of them.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the figures here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the same rows with this project, TRL and the plain Trainer: rows/s, memory, loss, gradient."""
    console = start()
    from guardtrain.bench.contenders import CONTENDERS
    from guardtrain.bench.step import StepOptions, bench_step, results_table
    from guardtrain.overrides import load_recipe

    check_writable("--json-file", json_file)
    options = StepOptions(
        rows=rows,
        steps=steps,
        min_seconds=min_seconds,
        policy_tokens=policy_tokens,
        batch_sizes=numbers("--batch-sizes", batch_sizes),
        peer_pack_tokens=peer_pack_tokens,
        peer_attention=peer_attention,
        peer_liger=peer_liger,
        contenders=tuple(contenders.split(",")) if contenders else tuple(CONTENDERS),
    )
    results = bench_step(load_recipe(recipe, overrides or []), options, console=console)
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(results)
        return
    output().print(results_table(results))
    if "best_peer" in results:
        output().print(f"{results['speedup_over_best_peer']:.2f} times the rows/s of {results['best_peer']}, the best peer")


@bench_app.command("device")
def bench_device(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Measure products and attention as its model and packs have them.")
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that work at the same time: GPUs, or shares of a CPU.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: what products are computed in.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process on a CPU.")] = None,
    geometry: Annotated[str | None, typer.Option(help="A config.json, when the recipe's model is not here.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="The recipe's training rows, when the data are not here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write it here, for `guardtrain plan --device`.")] = None,
) -> None:
    """Measure this machine for the planner: products, memory, operators, collectives."""
    start()
    from guardtrain.bench.device import measure_device, shapes_of_recipe, to_json
    from guardtrain.overrides import load_recipe

    check_writable("--json-file", json_file)
    if dtype not in {"float32", "bfloat16", "float16"}:
        raise ConfigError("unknown format", where="--dtype", expected="float32, bfloat16 or float16", found=dtype)
    shapes = None
    if recipe is not None:
        shapes = shapes_of_recipe(load_recipe(recipe, overrides or []), cast(Any, dtype), geometry=geometry, rows=rows)
    measured = to_json(measure_device(ranks=ranks, compute=cast(Any, dtype), threads=threads, shapes=shapes))
    if json_file:
        json_file.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print_json(measured)
