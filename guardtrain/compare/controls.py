"""The ways of tuning that are compared, each as a change of one recipe. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from guardtrain.config import Recipe
from guardtrain.errors import ConfigError

UNTUNED, ORDINARY, MLLR, MATCHED, SCORE_MATCHED = "untuned", "ordinary", "mllr", "norm-matched", "score-matched"


@dataclass(frozen=True, kw_only=True)
class Control:
    """One way of tuning.

    said: what it is, for people. secure: keys of the recipe's section `secure` that differ from plain training.
    rate: `same` as the recipe's, `lower` by secure.rho, or matched to `mllr`: such that the `update` is as large, or that as much
    is `learnt` of the held-out loss.
    """

    said: str
    secure: Mapping[str, Any] = field(default_factory=dict)
    rate: Literal["same", "lower", "update", "learnt"] = "same"
    is_subset_drawn: bool = False

    @property
    def is_matched(self) -> bool:
        """Whether its rate is found by what `mllr` did."""
        return self.rate in {"update", "learnt"}


CONTROLS: dict[str, Control] = {
    UNTUNED: Control(said="the model as it was given"),
    ORDINARY: Control(said="plain training, one rate for all weights"),
    "uniform-lower": Control(said="plain training at secure.rho times the rate", rate="lower"),
    MATCHED: Control(said="plain training at the one rate whose update is as large as that of mllr", rate="update"),
    SCORE_MATCHED: Control(said="plain training at the one rate whose held-out loss is that of mllr", rate="learnt"),
    "random-subset": Control(
        said="mllr with as many modules, drawn at random for each seed", secure={"method": "mllr"}, is_subset_drawn=True
    ),
    "reversed": Control(said="mllr with the two rates the other way round", secure={"method": "mllr", "reversed": True}),
    MLLR: Control(said="robust modules learn at the full rate, all others at secure.rho times it", secure={"method": "mllr"}),
    "warmup": Control(said="only robust modules learn at first, then all", secure={"method": "warmup"}),
    "middle": Control(said="the middle layers are frozen (in the style of SPPFT)", secure={"method": "middle"}),
    "mix": Control(said="safety data are mixed in", secure={"method": "mix"}),
    "ptst": Control(said="the safety template only when it is used (PTST)", secure={"template_at_inference_only": True}),
    "first-tokens": Control(said="the first tokens of answers are held near the model's own", secure={"method": "first_tokens"}),
    "project": Control(said="the update is projected after training (in the style of SafeLoRA)", secure={"method": "project"}),
}
DEFAULT = (UNTUNED, ORDINARY, "uniform-lower", MATCHED, SCORE_MATCHED, "random-subset", "reversed", MLLR, "warmup")


def chosen(names: str | None) -> tuple[str, ...]:
    """The controls of a comma-separated list in the order in which they are trained. Raises ConfigError."""
    wanted = DEFAULT if names is None else tuple(name.strip() for name in names.split(","))
    unknown = [name for name in wanted if name not in CONTROLS]
    if unknown or len(set(wanted)) < len(wanted):
        found = ", ".join(unknown) or "one twice"
        raise ConfigError("unknown controls", where="--controls", expected=", ".join(CONTROLS), found=found)
    needed = {ORDINARY}
    if any(CONTROLS[name].is_matched for name in wanted):
        needed |= {MLLR}
    if SCORE_MATCHED in wanted:
        needed |= {UNTUNED}
    if missing := needed.difference(wanted):
        found = f"no {' and no '.join(sorted(missing))}"
        raise ConfigError("others are measured against these", where="--controls", expected=", ".join(needed), found=found)
    # What is matched to others is trained after them.
    return tuple(sorted((name for name in CONTROLS if name in wanted), key=lambda name: CONTROLS[name].is_matched))


def recipe_of(recipe: Recipe, name: str, seed: int, folder: Path, rate_factor: float = 1.0) -> Recipe:
    """The recipe under which a control trains with `seed` into `folder`. rate_factor: of the learning rate."""
    control = CONTROLS[name]
    changes = {"method": "off", **control.secure}
    if control.is_subset_drawn:
        changes["random_subset"] = seed
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-{name}",
        secure=dataclasses.replace(recipe.secure, **changes),
        train=dataclasses.replace(recipe.train, seed=seed, learning_rate=recipe.train.learning_rate * rate_factor),
        output=dataclasses.replace(recipe.output, dir=str(folder), overwrite=False, mirror=None),
    )


def check_recipe(recipe: Recipe, names: tuple[str, ...]) -> None:
    """Raise ConfigError for a recipe that cannot be compared, or that lacks what one of the controls needs."""
    if recipe.task.kind != "instruct":
        raise ConfigError("not an instruct tune", where="task.kind", expected="instruct", found=recipe.task.kind)
    if recipe.secure.method != "off":
        found = f"{recipe.secure.method}, where each control sets its own"
        raise ConfigError("the recipe has a method already", where="secure.method", expected="off", found=found)
    for name in names:
        problems = list(recipe_of(recipe, name, recipe.train.seed, Path(name)).problems())
        if problems:
            hint = "guardtrain secure MODEL finds them" if "secure.modules" in problems[0] else None
            raise ConfigError("; ".join(problems), where=f"control {name}", hint=hint)
