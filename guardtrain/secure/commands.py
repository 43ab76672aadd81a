"""The commands of secure tuning. `guardtrain secure MODEL` searches; further ones stand beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from guardtrain.errors import ConfigError
from guardtrain.options import AsJson, check_new, one_of
from guardtrain.terminal import output, print_json, start

if TYPE_CHECKING:
    from rich.table import Table

    from guardtrain.secure.result import RobustModules

DEFAULT = "search"


class _SearchByDefault(TyperGroup):
    """What is no command is the model to search."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click has it, with the default command put in front."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


secure_app = typer.Typer(
    cls=_SearchByDefault,
    no_args_is_help=True,
    help="Find what must not be tuned fast (guardtrain secure MODEL), and measure whether that helps.",
)


@secure_app.command(DEFAULT)
def search(
    model: Annotated[str, typer.Argument(help="A model folder, an embedded name, a .gguf file, or a Hugging Face id.")],
    data: Annotated[str, typer.Option(help="Minimal pairs: a file, a data set, 'starter'.")] = "starter",
    out: Annotated[Path, typer.Option(help="A new file for what was found; recipes name it as secure.modules.")] = Path(
        "modules.json"
    ),
    out_of_source: Annotated[
        str | None, typer.Option(help="Pairs from elsewhere, to check what was found. Default: starter-hard beside starter.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=20, help="How many to take of --data: the shortest.")] = 200,
    layer: Annotated[int | None, typer.Option(min=1, help="Whose hidden states the probe reads. Default: the last.")] = None,
    perturbation: Annotated[str, typer.Option(help="noise, shrink, or tuned: towards the model of --tuned.")] = "noise",
    tuned: Annotated[str | None, typer.Option(help="A short benign tune of MODEL, whole.")] = None,
    tau: Annotated[float, typer.Option(help="AUROC, against where prompts stood, that the robust units may cost.")] = 0.02,
    seeds: Annotated[int, typer.Option(min=1, help="Of the noise.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first of them; it also draws the parts of the data.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Of a Hugging Face id.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one for each core of a CPU, one on a GPU.")] = None,
    picture: Annotated[Path | None, typer.Option(help="A new PNG: the robustness of every unit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search the units (layer and module) that can change without loss of the line between malicious and benign.

    The same command goes on after a stop. This is how it begins a secure tune: secure.method=mllr secure.modules=modules.json.
    """
    _check(perturbation=perturbation, tuned=tuned, tau=tau, dtype=dtype)
    for option, path in (("--out", out), ("--picture", picture)):
        if path is not None:
            check_new(option, path)
    console = start()
    import torch

    from guardtrain.config import ModelConfig
    from guardtrain.secure.run import SearchOptions, run_search

    options = SearchOptions(
        model=ModelConfig(name=model, revision=revision),
        data=data,
        outside=out_of_source or ("starter-hard" if data == "starter" else None),
        pairs=pairs,
        layer=layer,
        perturbation=perturbation,
        tuned=tuned,
        tau=tau,
        seeds=seeds,
        seed=seed,
        dtype=getattr(torch, dtype),
        processes=processes,
    )
    draw = _drawer() if picture is not None else None
    result = run_search(options, out, console)
    if draw is not None:
        draw(result, picture)
    if as_json:
        print_json(result.to_json())
    else:
        output().print(_table(result))
        typer.echo(
            f"{out}: {len(result.robust)} of {len(result.units)} units are robust together" + (f"; {picture}" if picture else "")
        )


def _check(*, perturbation: str, tuned: str | None, tau: float, dtype: str) -> None:
    one_of("--perturbation", perturbation, ("noise", "shrink", "tuned"))
    one_of("--dtype", dtype, ("float32", "bfloat16"))
    if (perturbation == "tuned") != (tuned is not None):
        found = "--tuned without it" if tuned else "no --tuned"
        raise ConfigError("needs a tuned model", where="--perturbation tuned", expected="--tuned FOLDER", found=found)
    if not 0 <= tau < 0.5:
        raise ConfigError("not a drop", where="--tau", expected="a number from 0 to below 0.5", found=str(tau))


def _drawer() -> Any:
    """Before an hour of search, not after it."""
    try:
        from guardtrain.secure.picture import write_heat_map
    except ImportError as error:
        hint = 'pip install "guardtrain[evaluate]"'
        raise ConfigError("a package is missing", where="--picture", expected=error.name, hint=hint) from error
    return write_heat_map


def _table(result: RobustModules) -> Table:
    from rich.table import Table

    title = f"{len(result.robust)} robust units disturbed together, strength {result.strength:.3g}; tau {result.tau:g}"
    table = Table(title=title, title_justify="left")
    for heading in ("measured", "prompts", "AUROC", "kept", "drop", "balanced accuracy", "disturbed"):
        table.add_column(heading, justify="left" if heading == "measured" else "right")
    untouched = result.untouched
    found = [f"{untouched.kept_auroc:.3f}", f"{untouched.kept_auroc - result.joint_drop:.3f}", f"{result.joint_drop:+.3f}"]
    prompts = str(2 * result.settings["pairs"]["search"])
    table.add_row("in the search", prompts, *found, f"{untouched.balanced_accuracy:.3f}", "")
    for check in result.checks:
        kept = [f"{each.kept_auroc:.3f}" for each in (check.untouched, check.disturbed)]
        accuracies = [f"{each.balanced_accuracy:.3f}" for each in (check.untouched, check.disturbed)]
        table.add_row(check.what, str(check.prompts), *kept, f"{check.drop:+.3f}", *accuracies)
    return table
