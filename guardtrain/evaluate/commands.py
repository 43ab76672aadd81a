"""The commands of measuring: evaluate, calibrate, ladder."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardtrain.errors import ConfigError
from guardtrain.options import AsJson, Columns, Labels, Overrides, check_writable, pairs, read_text
from guardtrain.terminal import output, print_json, start

if TYPE_CHECKING:
    from rich.console import Console

MaxPromptTokens = Annotated[int | None, typer.Option(min=1, help="Replaces the guard's own limit.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="A run or model folder, an embedded name, or a Hugging Face id.")],
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Labelled rows: files, 'starter', 'starter-hard', a benchmark's name.")
    ],
    modes: Annotated[str | None, typer.Option(help="off, on, both, cascade, separated by commas. Default: the guard's.")] = None,
    report: Annotated[Path | None, typer.Option(help="A folder: a full report as HTML, Markdown and JSON.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Another guard on the same rows, for the report. Repeatable.")
    ] = None,
    attacks: Annotated[bool, typer.Option("--attacks", help="Attacks on the guard itself, in the report.")] = False,
    timed_rows: Annotated[int, typer.Option(min=0, help="Rows that are timed one by one, for the report.")] = 24,
    sampled_rows: Annotated[int, typer.Option(min=0, help="Rows whose reasons are sampled five times, for the report.")] = 0,
    hide_prompts: Annotated[bool, typer.Option("--hide-prompts", help="No prompt and no reason in the report.")] = False,
    column: Columns = None,
    label: Labels = None,
    max_rows: Annotated[int | None, typer.Option(min=2, help="A seeded, balanced subset of the rows.")] = None,
    max_prompt_tokens: MaxPromptTokens = None,
    policy: Annotated[Path | None, typer.Option(help="A text file with another policy than the guard's own.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the figures here.")] = None,
    scores_file: Annotated[Path | None, typer.Option("--scores", help="Write id, label and scores of each row here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score labelled rows and measure a guard: AUROC, AUPRC, F1, recall at 1 % and 5 % FPR; with --report, everything."""
    console = start()
    from guardtrain.evaluate.files import evaluate_files, parse_modes
    from guardtrain.evaluate.report import measures_table, write_scores

    chosen = parse_modes(modes) if modes is not None else None
    columns, labels, text = pairs("--column", column), pairs("--label", label), read_text("--policy", policy)
    if os.environ.get("RANK", "0") == "0":  # the one that writes; two that try the same file would refuse each other
        for option, file in (("--scores", scores_file), ("--json-file", json_file)):
            check_writable(option, file)
    if report is not None:
        _alone("--report", {"--scores": scores_file, "--json-file": json_file, "--json": as_json})
        wanted: dict[str, Any] = {"modes": chosen, "columns": columns, "labels": labels, "max_rows": max_rows, "policy": text}
        wanted |= {"max_prompt_tokens": max_prompt_tokens, "against": pairs("--against", against), "with_attacks": attacks}
        wanted |= {"model": model, "data": data, "timed_rows": timed_rows, "sampled_rows": sampled_rows}
        _report(wanted, report, console, show_prompts=not hide_prompts)
        return
    result = evaluate_files(
        model,
        data,
        chosen,
        columns=columns,
        labels=labels,
        max_rows=max_rows,
        max_prompt_tokens=max_prompt_tokens,
        policy=text,
        console=console,
    )
    if scores_file:
        write_scores(result.evaluation, scores_file)
    if json_file:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(result.to_json())
    else:
        output().print(measures_table({", ".join(Path(name).name for name in data): result.evaluation}))
        calibration = result.guard.settings.calibration
        typer.echo(calibration.said() if calibration else "uncalibrated: thresholds are 0")


def _report(wanted: dict[str, Any], folder: Path, console: Console, *, show_prompts: bool) -> None:
    """wanted: fields of a Study."""
    try:
        from guardtrain.evaluate.reporting import write_report
        from guardtrain.evaluate.study import Study, run_study
    except ImportError as error:  # before an hour of scoring, not after it
        hint = 'pip install "guardtrain[evaluate]"'
        raise ConfigError("a package is missing", where="--report", expected=error.name, hint=hint) from error

    study = Study(**wanted, command=shlex.join(["guardtrain", *sys.argv[1:]]))
    folder.mkdir(parents=True, exist_ok=True)
    write_report(run_study(study, console=console), folder, show_prompts=show_prompts)
    typer.echo(f"{folder}/report.html, report.md, report.json")


def _alone(option: str, others: dict[str, object]) -> None:
    given = [name for name, value in others.items() if value]
    if given:
        raise ConfigError("cannot be combined", where=option, found=", ".join(given), hint="report.json holds the figures")


def calibrate(
    model: Annotated[str, typer.Argument(help="A run or model folder.")],
    data: Annotated[list[str] | None, typer.Argument(metavar="[DATA]...", help="Labelled rows that were not trained on.")] = None,
    fpr: Annotated[float, typer.Option(help="The rate of false alarms at which the thresholds are set.")] = 0.01,
    without_data: Annotated[bool, typer.Option("--without-data", help="Contextual calibration, when there are no rows.")] = False,
    column: Columns = None,
    label: Labels = None,
    max_prompt_tokens: MaxPromptTokens = None,
    as_json: AsJson = False,
) -> None:
    """Fit a guard's probabilities and thresholds on held-out rows, and write them into its guard.json."""
    if not 0 < fpr < 1:
        raise ConfigError("not a rate", where="--fpr", expected="a number between 0 and 1", found=str(fpr))
    if bool(data) == without_data:
        found = "both" if data else "neither"
        raise ConfigError("calibrated on what?", where="DATA", expected="labelled rows or --without-data", found=found)
    console = start()
    from guardtrain.evaluate.calibrate_files import calibrate_contextually, calibrate_files, calibration_table

    if data:
        columns, labels = pairs("--column", column), pairs("--label", label)
        settings = calibrate_files(
            model, data, fpr, columns=columns, labels=labels, max_prompt_tokens=max_prompt_tokens, console=console
        )
    else:
        settings = calibrate_contextually(model)
    calibration = settings.calibration
    assert calibration is not None
    if as_json:
        print_json({**calibration.to_json(), "cascade": settings.cascade})
        return
    output().print(calibration_table(calibration))
    for warning in calibration.warnings:
        typer.echo(f"warning: {warning}", err=True)


def ladder(
    recipe: Annotated[str, typer.Argument(help="A reasoned guard: a shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    base: Annotated[str | None, typer.Option(help="The base model of the first attempt. Default: the recipe's model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the same rows three times: labels alone, labels under an engineered policy, reasoned; one table and picture."""
    console = start()
    from guardtrain.overrides import load_recipe
    from guardtrain.train.ladder import climb, ladder_table, write_ladder

    wanted = load_recipe(recipe, overrides or [])
    rungs = climb(wanted, base, console=console)
    if not rungs:
        raise typer.Exit(130)
    write_ladder(rungs, Path(wanted.run_dir))
    if as_json:
        print_json([rung.to_json() for rung in rungs])
    else:
        output().print(ladder_table(rungs))
        typer.echo(f"{wanted.run_dir}/ladder.png, ladder.json; the guards are in the folders beside them")


def benchmarks(as_json: AsJson = False) -> None:
    """List the public sets that `evaluate` knows by name."""
    from guardtrain.evaluate.benchmarks import BENCHMARKS, benchmarks_json, benchmarks_table

    if as_json:
        print_json(benchmarks_json(BENCHMARKS))
    else:
        output().print(benchmarks_table(BENCHMARKS))
