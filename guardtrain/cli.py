"""The command line. Every command parses, calls and prints; torch is imported only by those that need it.

Exit codes: 0 done; 1 the answer is no; 2 bad input, in one line; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from guardtrain import __version__
from guardtrain.bench.commands import bench_app
from guardtrain.compare.commands import compare
from guardtrain.errors import ConfigError, GuardtrainError
from guardtrain.evaluate.commands import benchmarks, calibrate, evaluate, ladder
from guardtrain.options import AsJson, Columns, Labels, Overrides, one_of, pairs
from guardtrain.prepare.commands_ask import generate, reason
from guardtrain.prepare.commands_build import build, mine, push
from guardtrain.prepare.commands_clean import clean
from guardtrain.publish.commands import push as push_guard
from guardtrain.secure.commands import secure_app
from guardtrain.serve.commands import serve
from guardtrain.terminal import output, print_json, start

if TYPE_CHECKING:
    from guardtrain.config import Recipe
    from guardtrain.distributed.preemption import Status

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Check and prepare data.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(secure_app, name="secure")

INTERRUPTED = 130
# 2026-11: newer typer carries a click of its own; the public BadParameter leads to the right base class in every version.
USAGE_ERROR: type[Any] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")]
AutoResume = Annotated[bool, typer.Option("--auto-resume", help="Resume where there is a checkpoint, else start anew.")]
Check = Annotated[bool, typer.Option("--check", help="Look at the nodes and the disk, and train nothing.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Fine-tune language models into reasoning guards, and measure them honestly."""


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="The run folder; an earlier quickstart in it is replaced.")] = Path(
        "runs/quickstart"
    ),
    as_json: AsJson = False,
) -> None:
    """Train the embedded model on the starter data: before, after, sample verdicts, and a guard to use."""
    console = start()
    from guardtrain.overrides import load_recipe
    from guardtrain.train.quickstart import run_quickstart

    recipe = load_recipe("quickstart", [f"output.dir={json.dumps(str(out))}", *(overrides or [])])
    report = run_quickstart(recipe, console=console)
    if not report.finished:
        raise typer.Exit(INTERRUPTED)
    if as_json:
        print_json(report.to_json())
    else:
        report.show(output())


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    resume: Resume = False,
    auto_resume: AutoResume = False,
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe on this machine and measure it on the held-out rows."""
    console = start()
    from guardtrain.distributed.ranks import launched
    from guardtrain.evaluate.report import measures_table
    from guardtrain.train.check import check_nodes
    from guardtrain.train.run import run

    wanted = _recipe_of_ranks(recipe, overrides or [])
    if check:
        _end("done" if check_nodes(wanted, console=output()) else "negative")
    outcome = run(wanted, resume="auto" if auto_resume else resume, console=console)
    if outcome.stopped_by is not None:
        _end(outcome.stopped_by.status)
    if not launched().is_main:
        return
    if as_json:
        print_json(outcome.summary)
    elif outcome.evaluation:
        output().print(measures_table({"held-out rows": outcome.evaluation}))
        output().print(f"guard: {outcome.folder.model}", markup=False)
    else:
        losses = outcome.summary["held_out_loss"]
        before = "" if losses["before"] is None else f"{losses['before']:.4f} before, "
        output().print(f"held-out loss: {before}{losses['after']:.4f} after")
        output().print(f"model: {outcome.folder.model}", markup=False)
    _end("done")


@app.command()
def launch(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Ranks of each: its GPUs, or processes on a machine without.")] = 1,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit a job that is requeued until it is done.")] = False,
    sbatch: Annotated[list[str] | None, typer.Option(metavar="OPTION", help="For sbatch: --sbatch=--time=24:00:00.")] = None,
    resume: Resume = False,
    auto_resume: AutoResume = False,
    check: Check = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every command and file, start nothing.")] = False,
) -> None:
    """Train a recipe on several GPUs or machines; distributed.strategy says how they share the work."""
    from guardtrain.distributed.launch import Cluster, execute, plan_start
    from guardtrain.overrides import load_recipe

    given = overrides or []
    flags = {"--resume": resume, "--auto-resume": auto_resume, "--check": check}
    cluster = Cluster(nodes=nodes, gpus_per_node=gpus_per_node, slurm=slurm, sbatch_options=tuple(sbatch or ()))
    arguments = [recipe, *given, *(flag for flag, is_set in flags.items() if is_set)]
    start = plan_start(load_recipe(recipe, given), arguments, cluster)
    if dry_run or start.by_hand:
        typer.echo(start.shown(), nl=False)
        return
    raise typer.Exit(execute(start.commands[0]))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    cluster: Annotated[str, typer.Option(help="NODESxGPUSxNAME, for example 16x8xH100-80GB.")] = "1xH100-80GB",
    geometry: Annotated[str | None, typer.Option(help="A config.json, when the recipe's model is not here.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Training rows, when the data are not here.")] = None,
    device: Annotated[Path | None, typer.Option(help="A JSON file that describes the device by its numbers.")] = None,
    network_gbit: Annotated[float | None, typer.Option(help="Network of a node, all its cards together.")] = None,
    host_gib: Annotated[float | None, typer.Option(help="Memory of a node.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU for an hour.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for what runs the plan: recipe, accelerate's file, run.sh.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a recipe needs: memory, time, money, the best way to run it. Exit code 1 when nothing fits the cluster."""
    from guardtrain.overrides import load_recipe
    from guardtrain.plan.files import write_files
    from guardtrain.plan.geometry import read_geometry
    from guardtrain.plan.hardware import DEVICES, parse_cluster, read_device
    from guardtrain.plan.report import show, to_json
    from guardtrain.plan.search import make_plan
    from guardtrain.plan.workload import workload_of

    given = overrides or []
    wanted = load_recipe(recipe, given)
    devices = DEVICES
    if device is not None:
        described = read_device(device)
        devices = {described.name.lower(): described}
    where = parse_cluster(cluster, network_gbit=network_gbit, host_gib=host_gib, devices=devices)
    planned = make_plan(wanted, read_geometry(geometry or wanted.model.name), workload_of(wanted, rows=rows), where)
    typed = [recipe, *given]
    written = write_files(planned, planned.chosen, typed, out) if out is not None and planned.chosen else []
    if as_json:
        print_json(to_json(planned, typed, price=price))
    else:
        show(planned, typed, console=output(), price=price)
        for file in written:
            output().print(f"wrote: {file}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if planned.chosen else 1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[
        str, typer.Option(help="merged: a whole model; adapter: that of lora or qlora alone; gguf: for llama.cpp; ollama; vllm.")
    ],
    checkpoint: Annotated[
        str | None, typer.Option(help="Its name. Default: the finished model, else the newest valid one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder. Default: RUN/exported/….")] = None,
    shard_gb: Annotated[float, typer.Option(help="Size of one file of weights, at most.")] = 5.0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, for gguf and ollama also q8_0. Default: as it is saved.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model, also from ZeRO's shards, for transformers, llama.cpp, Ollama or vLLM; what was cut off goes on."""
    one_of("--to", to, ("merged", "adapter", "gguf", "ollama", "vllm"))
    if dtype is not None:
        one_of("--dtype", dtype, ("float32", "bfloat16", "float16", "q8_0"))
    if not shard_gb > 0:
        raise ConfigError("not a size", where="--shard-gb", expected="a number above 0", found=str(shard_gb))
    console = start()
    from guardtrain.train.export import ExportOptions, export_run

    options = ExportOptions(to=to, checkpoint=checkpoint, out=out, shard_bytes=round(shard_gb * 1e9), dtype=dtype)
    done = export_run(run, options, console)
    if as_json:
        print_json(done.to_json())
    else:
        typer.echo(done.said())


secure_app.command()(compare)
app.command()(evaluate)
app.command()(calibrate)
app.command()(ladder)
app.command()(benchmarks)
app.command("push")(push_guard)
app.command()(serve)
for command in (clean, generate, reason, build, push, mine):
    data_app.command()(command)


@data_app.command("check")
def data_check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Data files, folders, ids, 'starter' or 'starter-hard'.")],
    kind: Annotated[str, typer.Option(help="guard or instruct.")] = "guard",
    column: Columns = None,
    label: Labels = None,
    reasons: Annotated[str | None, typer.Option(help="A JSONL file of reasons to join by id.")] = None,
    exclude: Annotated[str | None, typer.Option(help="A JSONL file of ids to leave out.")] = None,
    model: Annotated[str | None, typer.Option(help="Count tokens with this model's tokenizer.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=16, help="The token budget of a prompt.")] = 2048,
    as_json: AsJson = False,
) -> None:
    """List every problem of data files, with file and line. Exit code 2 when a row could not be trained on."""
    from guardtrain.data.report import check_files, show_report

    if kind not in {"guard", "instruct"}:
        raise ConfigError("unknown kind", where="--kind", expected="guard or instruct", found=kind)
    report = check_files(
        files,
        kind="instruct" if kind == "instruct" else "guard",
        columns=pairs("--column", column),
        labels=pairs("--label", label),
        reasons=reasons,
        exclude=exclude,
        max_prompt_tokens=max_prompt_tokens if model else None,
        count_tokens=_token_counter(model) if model else None,
    )
    if as_json:
        print_json(report.to_json())
    else:
        show_report(report, output())
    raise typer.Exit(report.exit_code)


def main() -> None:
    """The console script `guardtrain`."""
    raise SystemExit(_run(app))


def train_main() -> None:
    """`python -m guardtrain.train RECIPE …`: what a launcher starts on each rank."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(train)
    raise SystemExit(_run(single))


def _run(command: typer.Typer) -> int:
    """Run a command; one clear line and exit code 2 for every error that guardtrain foresaw."""
    debug = "--debug" in sys.argv
    try:
        # Outside standalone mode the code of a typer.Exit comes back as the result.
        code = command(standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except USAGE_ERROR as error:
        error.show()
        return 2
    except GuardtrainError as error:
        if debug:
            raise
        if not error.is_said:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return _refused_by_all() if error.is_agreed else 2
    except OSError as error:  # an output file that cannot be written, a disk that is full
        if debug:
            raise
        print(f"{error.filename or type(error).__name__}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _recipe_of_ranks(recipe: str, overrides: list[str]) -> Recipe:
    """The recipe; where it is wrong, one rank of each node says so."""
    from guardtrain.overrides import load_recipe

    try:
        return load_recipe(recipe, overrides)
    except GuardtrainError as error:
        error.is_said = os.environ.get("LOCAL_RANK", "0") != "0"
        _told("refused")  # and still exit with 2: other nodes may have read another recipe
        raise


def _end(status: Status) -> NoReturn:
    """End a run that all ranks end alike."""
    raise typer.Exit(_told(status))


def _refused_by_all() -> int:
    from guardtrain.distributed.ranks import leave

    leave()
    return _told("refused")


def _told(status: Status) -> int:
    """What to exit with once the job script, if there is one, knows how the run has ended."""
    from guardtrain.distributed.preemption import EXIT_CODES, tell_the_job

    return 0 if tell_the_job(status) else EXIT_CODES[status]


def _token_counter(model: str) -> Any:
    from guardtrain.data.template import PlainEncoder
    from guardtrain.model.load import load_tokenizer

    encoder = PlainEncoder(load_tokenizer(model))
    return lambda text: len(encoder.plain(text))
