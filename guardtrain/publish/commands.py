"""The command that publishes a guard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardtrain.errors import ConfigError
from guardtrain.options import AsJson, check_writable
from guardtrain.terminal import print_json, start


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run, its model folder, or what `guardtrain export` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Of the Hugging Face Hub; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For everyone. Without it the repository must be private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go where, card included; nothing is sent.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="What `evaluate --report` wrote. Default: the figures of the run's summary.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(metavar="SPDX", help="Of the base model, where guardtrain does not know.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The base model's name on the Hub, where it was a folder here.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="OWNER/NAME", help="A data set on the Hub that it was trained on. Repeatable.")
    ] = None,
    card: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the model card here too.")] = None,
    token_env: Annotated[str, typer.Option(metavar="NAME", help="The environment variable that holds the token.")] = "HF_TOKEN",
    as_json: AsJson = False,
) -> None:
    """Push a guard with a model card to the Hugging Face Hub: private unless --public."""
    start()
    from guardtrain.hub import push as push_files
    from guardtrain.hub import read_token

    try:
        from guardtrain.publish.facts import Told
        from guardtrain.publish.push import plan_guard_push
    except ImportError as error:
        raise ConfigError("a package is missing", expected=error.name, hint='pip install "guardtrain[evaluate]"') from error

    check_writable("--card", card)
    told = Told(base=base_model, licence=licence, data_sets=tuple(dataset or ()), report=report)
    planned = plan_guard_push(folder, repository, told, is_public=public)
    commit = None if dry_run else push_files(planned.push, read_token(token_env))
    if card is not None:
        card.write_text(planned.card, encoding="utf-8")
    if as_json:
        print_json({**planned.to_json(), "commit": commit})
        return
    for warning in planned.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{'would push' if dry_run else 'pushed'}: {planned.push.said()}")
    if dry_run and card is None:
        typer.echo(f"\n{planned.card}")
