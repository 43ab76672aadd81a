"""The commands that end in a data set: build, push, mine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardtrain.errors import ConfigError
from guardtrain.options import AsJson, Columns, Labels, one_of, pairs
from guardtrain.terminal import output, print_json, start

if TYPE_CHECKING:
    from rich.table import Table

    from guardtrain.prepare.facts import Facts

Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Rows: files, folders, Hugging Face ids, 'starter'.")]


def build(
    files: Files,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the data set.")],
    kind: Annotated[str, typer.Option(help="guard: labelled prompts; instruct: questions and answers.")] = "guard",
    decontaminate: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=PATH]", help="A benchmark whose rows must not be here. Repeatable.")
    ] = None,
    column: Columns = None,
    label: Labels = None,
    validation: Annotated[float, typer.Option(help="Held out of the rows that have no split yet.")] = 0.05,
    test: Annotated[float, typer.Option(help="The same for the test split.")] = 0.05,
    class_ratio: Annotated[float, typer.Option(help="The larger class to one row of the smaller, at most; 0: as it is.")] = 1.0,
    match_lengths: Annotated[bool, typer.Option("--match-lengths", help="Even the classes out at each prompt length.")] = False,
    licence: Annotated[str | None, typer.Option(metavar="SPDX", help="What the data card says, for example CC-BY-4.0.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws for splits and balance.")] = 0,
    save_to_disk: Annotated[bool, typer.Option("--save-to-disk", help="Also a folder that `datasets` loads.")] = False,
    as_json: AsJson = False,
) -> None:
    """Filter, split and balance rows into a data set with a report and a data card. Exit code 1 when no row is left."""
    one_of("--kind", kind, ("guard", "instruct"))
    _check_fractions(validation, test)
    if class_ratio and class_ratio < 1:
        raise ConfigError("not a ratio", where="--class-ratio", expected="at least 1, or 0", found=str(class_ratio))
    console = start()
    from guardtrain.prepare.assign import Fractions
    from guardtrain.prepare.build import REJECTED_FILE, BuildOptions
    from guardtrain.prepare.build import build as build_folder

    options = BuildOptions(
        files=tuple(files),
        kind="instruct" if kind == "instruct" else "guard",
        columns=pairs("--column", column),
        labels=pairs("--label", label),
        decontaminate=tuple(decontaminate or ()),
        fractions=Fractions(validation=validation, test=test),
        class_ratio=class_ratio or None,
        match_lengths=match_lengths,
        licence=licence,
        seed=seed,
        save_to_disk=save_to_disk,
    )
    facts = build_folder(options, out, console=console)
    if as_json:
        print_json(facts.to_json())
    else:
        output().print(_table(facts))
        for warning in facts.warnings:
            typer.echo(f"warning: {warning}", err=True)
        typer.echo(f"{facts.kept:,} of {facts.read:,} rows: {out}; the others are in {out / REJECTED_FILE}")
    raise typer.Exit(0 if facts.kept else 1)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `guardtrain data build` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Of the Hugging Face Hub; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For everyone. Without it the repository must be private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go where; nothing is asked or sent.")] = False,
    token_env: Annotated[str, typer.Option(metavar="NAME", help="The environment variable that holds the token.")] = "HF_TOKEN",
    as_json: AsJson = False,
) -> None:
    """Push a data set with its card to the Hugging Face Hub: private unless --public, without the rows that were left out."""
    start()
    from guardtrain.hub import push as push_files
    from guardtrain.hub import read_token
    from guardtrain.prepare.push import plan_push

    planned = plan_push(folder, repository, is_public=public)
    commit = None if dry_run else push_files(planned, read_token(token_env))
    if as_json:
        print_json({**planned.to_json(), "commit": commit})
    else:
        typer.echo(f"{'would push' if dry_run else 'pushed'}: {planned.said()}")


def mine(
    model: Annotated[str, typer.Argument(help="A run or model folder of a guard that reasons.")],
    files: Files,
    out: Annotated[Path, typer.Option("--out", help="A new JSON Lines file for the rows that flip.")],
    samples: Annotated[int, typer.Option(min=2, help="Reasons for each row.")] = 8,
    temperature: Annotated[float, typer.Option(help="At which they are drawn.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Replaces the guard's own limit.")] = None,
    column: Columns = None,
    label: Labels = None,
    as_json: AsJson = False,
) -> None:
    """Sample a trained guard several times for each row and keep the rows whose verdict flips. Exit code 1 when none does."""
    if not temperature > 0:
        raise ConfigError("not a temperature", where="--temperature", expected="a number above 0", found=str(temperature))
    console = start()
    from guardtrain.prepare.mine import MineOptions
    from guardtrain.prepare.mine import mine as mine_rows

    options = MineOptions(samples=samples, temperature=temperature, seed=seed, max_prompt_tokens=max_prompt_tokens)
    columns, labels = pairs("--column", column), pairs("--label", label)
    mined = mine_rows(model, files, out, options, columns=columns, labels=labels, console=console)
    if as_json:
        print_json(mined.to_json())
    else:
        where = f": {out}" if mined.flipping else "; no file was written"
        wrong = f"{mined.always_wrong:,} are wrong in all of {samples} samples"
        typer.echo(f"{mined.flipping:,} of {mined.rows:,} rows flip{where}; {wrong}")
    raise typer.Exit(0 if mined.flipping else 1)


def _check_fractions(validation: float, test: float) -> None:
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        expected = "numbers from 0, below 1 together"
        raise ConfigError("not fractions", where="--validation, --test", expected=expected, found=f"{validation}, {test}")


def _table(facts: Facts) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("rows")
    for heading in ("all", "malicious", "benign"):
        table.add_column(heading, justify="right")
    for name, part in facts.splits.items():
        table.add_row(
            name, f"{part.rows:,}", *(f"{part.labels[key]:,}" if part.labels else "" for key in ("malicious", "benign"))
        )
    for cause, count in facts.rejected.items():
        table.add_row(f"left out: {cause}", f"{count:,}", "", "")
    return table
