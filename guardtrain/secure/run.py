"""`guardtrain secure MODEL`: from a model and prompts to `modules.json`, and again from where it was stopped."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from guardtrain.config import ModelConfig
from guardtrain.errors import ModelError
from guardtrain.model.load import load_tokenizer
from guardtrain.secure.features import load_reader
from guardtrain.secure.journal import Journal, task_key
from guardtrain.secure.measure import Disturbed, Setup, Workers, fitted_probe, searched_weights
from guardtrain.secure.perturb import SEEDED, STRONGEST
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.prompts import FIT, Prompts, data_digest, load_prompts
from guardtrain.secure.result import Check, RobustModules, model_fingerprint
from guardtrain.secure.search import OUTSIDE, REPORT, SEARCH, Search, Task, ascending, grow, mean_figures
from guardtrain.secure.units import Unit, decoder_layers

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What to search, and how.

    data: minimal pairs. outside: pairs from elsewhere that only check what was found. pairs: of `data`, how many. layer: whose
    hidden states the probe reads, counted from 1; None: the last. perturbation: noise, shrink, or tuned, towards the model
    `tuned`. tau: `kept_auroc` that may be lost by all robust units together. seeds: of the perturbation, from `seed` on,
    which also draws the parts. processes: None: as many as the machine has cores and memory for; a GPU has one.
    """

    model: ModelConfig
    data: str = "starter"
    outside: str | None = "starter-hard"
    pairs: int = 200
    layer: int | None = None
    perturbation: str = "noise"
    tuned: str | None = None
    tau: float = 0.02
    seeds: int = 3
    seed: int = 0
    dtype: torch.dtype = torch.float32
    processes: int | None = None

    @property
    def is_seeded(self) -> bool:
        """Whether another seed is another perturbation."""
        return self.perturbation in SEEDED

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """Of the search."""
        return tuple(range(self.seed, self.seed + self.seeds)) if self.is_seeded else (self.seed,)

    @property
    def fresh_numbers(self) -> tuple[int, ...]:
        """Of the checks: other ones, where seeds matter."""
        return tuple(number + self.seeds for number in self.seed_numbers) if self.is_seeded else self.seed_numbers


def run_search(options: SearchOptions, out: Path, console: Console) -> RobustModules:
    """Search, and write `out`. A search that was stopped goes on where it was.

    Raises ConfigError, DataError and ModelError for what cannot be searched, and where every unit is robust, or none.
    """
    parts = load_prompts(
        options.data,
        options.outside,
        load_tokenizer(options.model.name, options.model.revision),
        pairs=options.pairs,
        seed=options.seed,
    )
    model_hash, data_hash = model_fingerprint(options.model), data_digest(parts)
    settings = _settings(options, parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = {name: value for name, value in settings.items() if name != "tau"}  # another tau asks nothing that is not known
    with Journal(out, {"model": model_hash, "data": data_hash, **measured}) as journal:
        with _measuring(options, parts, journal, console) as (meter, units):
            found = _search(options, meter, units)
        result = RobustModules(
            **found,
            tau=options.tau,
            settings=settings,
            model=options.model.name,
            model_hash=model_hash,
            data_hash=data_hash,
            made=datetime.now(UTC).date().isoformat(),
        )
        result.write(out)
        journal.discard()
    return result


def _settings(options: SearchOptions, parts: dict[str, Prompts]) -> dict[str, Any]:
    return {
        "data": options.data,
        "out_of_source": options.outside,
        "pairs": {name: len(part.ids) // 2 for name, part in parts.items()},
        "tokens": sum(len(ids) for part in parts.values() for ids in part.ids),
        "layer": options.layer,
        "perturbation": options.perturbation,
        "tuned": None if options.tuned is None else model_fingerprint(ModelConfig(name=options.tuned)),
        "tau": options.tau,
        "seeds": list(options.seed_numbers),
        "fresh_seeds": list(options.fresh_numbers),
        "seed": options.seed,
        "dtype": str(options.dtype).removeprefix("torch."),
    }


class _Meter:
    """Measures what the journal does not know, and moves the bar. Costs are in layers that are computed."""

    def __init__(self, workers: Workers, journal: Journal, progress: Progress, layers: int, parts: dict[str, Prompts]) -> None:
        self.workers, self.journal, self.progress, self.layers, self.parts = workers, journal, progress, layers, parts
        self._bar = progress.add_task("")

    def measure(self, tasks: Sequence[Task]) -> list[ProbeFigures]:
        """The figures of each task."""
        left = []
        for task in tasks:
            if self.journal.find(task) is None:
                left.append(task)
            else:
                self.progress.advance(self._bar, self.cost(task))
        for task, figures in self.workers.measure(left):
            self.journal.add(task, figures)
            self.progress.advance(self._bar, self.cost(task))
        return [self.journal.known[task_key(task)] for task in tasks]

    def cost(self, task: Task) -> int:
        """Layers to compute; prompts that are not the search's are read from the first."""
        return self.layers - (min((unit.layer for unit in task.units), default=0) if task.prompts == SEARCH else 0)

    def stage(self, what: str, left: float) -> None:
        """From here on the bar says `what`, and about `left` layers are still to be computed."""
        done = self.progress.tasks[0].completed
        self.progress.update(self._bar, description=what, total=done + left)


@contextmanager
def _measuring(
    options: SearchOptions, parts: dict[str, Prompts], journal: Journal, console: Console
) -> Iterator[tuple[_Meter, list[Unit]]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    model = load_reader(options.model, options.dtype)
    units, layers = list(searched_weights(model, options.layer)), options.layer or len(decoder_layers(model)[1])
    probe = fitted_probe(model, parts[FIT], options.layer)
    setup = Setup(
        model=options.model,
        dtype=options.dtype,
        layer=options.layer,
        perturbation=options.perturbation,
        tuned=options.tuned,
        parts=parts,
    )
    processes = options.processes or _processes(model)
    disturbed = Disturbed.of(model, setup, probe) if processes == 1 else None
    del model  # each process has one of its own
    with (
        closing(Workers(setup, probe, processes, disturbed)) as workers,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        yield _Meter(workers, journal, progress, layers, parts), units


def _processes(model: Any) -> int:
    """One for each core of a CPU, as far as half of the memory reaches: one thread each is faster than threads of one."""
    if next(model.parameters()).is_cuda:
        return 1
    # All units are disturbed at once, too, and what they were is kept meanwhile.
    num_bytes = 2 * sum(weight.numel() * weight.element_size() for weight in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2 // int(num_bytes)))


def _search(options: SearchOptions, meter: _Meter, units: list[Unit]) -> dict[str, Any]:
    """The fields of the result that are measured."""
    seeds, layers = len(options.seed_numbers), meter.layers
    checking = layers * (3 * seeds + 2)
    growing = (1 + math.log2(len(units))) * seeds * layers
    singles = seeds * sum(layers - unit.layer for unit in units)
    meter.stage("strength", 8 * seeds * layers + singles + growing + checking)
    search = Search(meter.measure, units, seeds=options.seed_numbers, strongest=STRONGEST[options.perturbation])
    log.info("the probe on the search prompts: %s", search.untouched.said())
    strength = search.breaking_strength()
    log.info("all %d units at strength %.3g break it", len(units), strength)
    meter.stage("each unit", singles + growing + checking)
    alone = search.alone(strength)
    meter.stage("together", growing + checking)
    robust, joint_drop = grow(ascending(alone), lambda some: search.drop(some, strength), options.tau)
    _require_both(units, robust, min(loss.drop for loss in alone.values()), options.tau)
    meter.stage("checks", checking)
    return {
        "units": {unit: alone[unit].drop for unit in units},
        "robust": tuple(robust),
        "joint_drop": joint_drop,
        "strength": strength,
        "untouched": search.untouched,
        "checks": tuple(_checks(options, meter, robust, strength)),
    }


def _require_both(units: Sequence[Unit], robust: Sequence[Unit], least: float, tau: float) -> None:
    """Raise ModelError where there would be nothing to train faster, or nothing to train slower."""
    if not robust:
        found = f"{least:.3f} for the first alone"
        raise ModelError("no unit is robust", expected=f"a drop of at most {tau:g}", found=found, hint="a larger --tau")
    if len(robust) == len(units):
        raise ModelError("every unit is robust: there is nothing to protect", found=f"tau {tau:g}", hint="a smaller --tau")


def _checks(options: SearchOptions, meter: _Meter, robust: Sequence[Unit], strength: float) -> Iterator[Check]:
    """The robust units together, with seeds and on prompts that had no say in choosing them."""
    wanted = {"fresh seed": SEARCH} if options.is_seeded else {}
    for what, part in {**wanted, "report": REPORT, "out of source": OUTSIDE}.items():
        if part == OUTSIDE and options.outside is None:
            continue
        disturbed = [Task(tuple(robust), strength, seed, part) for seed in options.fresh_numbers]
        untouched, *figures = meter.measure([Task(prompts=part), *disturbed])
        prompts = len(meter.parts[part].ids)
        yield Check(what=what, prompts=prompts, untouched=untouched, disturbed=mean_figures(figures))
