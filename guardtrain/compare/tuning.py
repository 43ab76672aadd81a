"""Training one control with one seed: what is finished is not trained again, what was cut off goes on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from guardtrain.compare.controls import recipe_of
from guardtrain.compare.norms import UpdateNorms, read_norms, update_norms, write_norms
from guardtrain.compare.statistics import next_factor
from guardtrain.config import Recipe
from guardtrain.errors import ConfigError
from guardtrain.overrides import load_recipe, recipe_to_tree
from guardtrain.secure.units import Unit
from guardtrain.train.folder import RunFolder
from guardtrain.train.run import run

NORMS = "update_norms.json"
TOLERANCE = 0.03  # of what is matched: an update norm, or what was learnt
MOST_TRIES = 4
LEAST = 1e-6  # counts as reached by a run that made things worse: logarithms are taken
# `recipe.yaml` holds where the run went, and what only says how it is watched and cut up.
SET_ASIDE = {"name", "output", "evaluate", "distributed"}


class Stopped(Exception):
    """The run was told to stop, and has saved what it had."""


@dataclass(frozen=True)
class Tuned:
    """A finished run that has its model still. tried: see `Measured`."""

    folder: RunFolder
    norms: UpdateNorms
    rate_factor: float = 1.0
    tried: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Tuner:
    """Trains controls of one recipe below `root`. base: the folder of the model. robust: the modules that mllr favours."""

    recipe: Recipe
    root: Path
    base: Path
    robust: Collection[Unit]
    console: Console

    def tuned(self, control: str, seed: int, rate_factor: float = 1.0, attempt: int | None = None) -> Tuned:
        """The run of a control, trained unless it is finished. Raises Stopped."""
        name = f"{control}-{seed}" + ("" if attempt is None else f"-try-{attempt}")
        recipe = recipe_of(self.recipe, control, seed, self.root / name, rate_factor)
        folder = RunFolder(Path(recipe.run_dir))
        if not _is_finished(folder, recipe) and not run(recipe, resume="auto", console=self.console).finished:
            raise Stopped
        norms = read_norms(folder.root / NORMS)
        if norms is None:
            norms = update_norms(self.base, folder.model, self.robust)
            write_norms(norms, folder.root / NORMS)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)  # three times the model, and never resumed again
        return Tuned(folder, norms, rate_factor)

    def matched(
        self, control: str, seed: int, reached: Callable[[Tuned], float], target: float, ordinary: float, correction: float = 1.0
    ) -> Tuned:
        """The run at the rate that reaches `target`, within TOLERANCE where MOST_TRIES do.

        reached: what is matched, of a run; it grows with the rate. ordinary: that at the recipe's own rate. correction: of the
        first guess, from another seed. Raises Stopped, and ConfigError where nothing can be matched.
        """
        if not (target > 0 and ordinary > 0):
            raise ConfigError("nothing was learnt, so no rate can match it", where=control, found=f"{ordinary:g}, {target:g}")
        tried: list[tuple[Tuned, float]] = []
        factor = correction * target / ordinary
        while len(tried) < MOST_TRIES:
            tuned = self.tuned(control, seed, factor, attempt=len(tried) + 1)
            tried.append((tuned, max(reached(tuned), LEAST)))
            if abs(tried[-1][1] / target - 1) <= TOLERANCE:
                break
            factor = next_factor([(1.0, ordinary), *((each.rate_factor, value) for each, value in tried)], target)
        nearest, _ = min(tried, key=lambda each: abs(each[1] / target - 1))
        return dataclasses.replace(nearest, tried=tuple((each.rate_factor, value) for each, value in tried))

    def discard(self, control: str, seed: int) -> None:
        """Delete the weights of a control's runs; recipe, log, metrics and norms stay."""
        for folder in self.root.glob(f"{control}-{seed}*"):
            if folder.name == f"{control}-{seed}" or folder.name.startswith(f"{control}-{seed}-try-"):
                shutil.rmtree(RunFolder(folder).model, ignore_errors=True)


def _is_finished(folder: RunFolder, recipe: Recipe) -> bool:
    if not (folder.summary.is_file() and folder.model.is_dir() and folder.recipe.is_file()):
        return False
    return _trains(load_recipe(str(folder.recipe))) == _trains(recipe)


def _trains(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides which model comes out."""
    return {key: value for key, value in recipe_to_tree(recipe).items() if key not in SET_ASIDE}
