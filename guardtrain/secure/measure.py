"""Measurements of a search on a model: here, or shared out among processes, each with a copy of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from guardtrain.config import ModelConfig
from guardtrain.errors import ConfigError, ModelError
from guardtrain.secure.features import PromptFeatures, load_reader
from guardtrain.secure.perturb import Perturbation, Weights, noise, perturbed, shrink, towards
from guardtrain.secure.probe import Probe, ProbeFigures, fit_probe
from guardtrain.secure.prompts import FIT, Prompts
from guardtrain.secure.search import SEARCH, Task
from guardtrain.secure.units import Unit, unit_weights
from guardtrain.workers import worker_pool


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a process needs to measure. tuned: for the perturbation of that name, the tuned model."""

    model: ModelConfig
    dtype: torch.dtype
    layer: int | None
    perturbation: str
    tuned: str | None
    parts: Mapping[str, Prompts]


@dataclass(frozen=True)
class Disturbed:
    """A frozen probe on fixed prompts of a model that can be disturbed. features, parts, before: by name, the last the margins
    of the untouched model."""

    weights: Weights
    perturbation: Perturbation
    probe: Probe
    features: Mapping[str, PromptFeatures]
    parts: Mapping[str, Prompts]
    before: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, model: Any, setup: Setup, probe: Probe) -> Disturbed:
        """Reads all prompts but those that the probe is fitted on; what enters each layer is kept of the search's alone."""
        parts = {name: part for name, part in setup.parts.items() if name != FIT}
        weights = searched_weights(model, setup.layer)
        features = {
            name: PromptFeatures(model, part.ids, layer=setup.layer, keeps=name == SEARCH) for name, part in parts.items()
        }
        before = {name: probe.margins(each.read()) for name, each in features.items()}
        return cls(weights, _perturbation(setup, weights), probe, features, parts, before)

    def figures(self, task: Task) -> ProbeFigures:
        """One measurement; the model is afterwards what it was."""
        with perturbed(self.weights, task.units, self.perturbation, task.strength, task.seed):
            features_ND = self.features[task.prompts].read(min((unit.layer for unit in task.units), default=0))
        return self.probe.figures(features_ND, self.parts[task.prompts].is_malicious_N, self.before[task.prompts])


def searched_weights(model: Any, layer: int | None) -> dict[Unit, list[torch.nn.Parameter]]:
    """The weights of every unit that the feature depends on. Raises ModelError where there are none."""
    return {unit: found for unit, found in unit_weights(model).items() if layer is None or unit.layer < layer}


def fitted_probe(model: Any, prompts: Prompts, layer: int | None) -> Probe:
    """The probe on the untouched model."""
    features = PromptFeatures(model, prompts.ids, layer=layer, keeps=False)
    return fit_probe(features.read(), prompts.is_malicious_N)


class Workers:
    """Measures tasks, each as soon as a process is free.

    disturbed: the model, for one process; None where `processes` load one each, with their share of the cores.
    """

    def __init__(self, setup: Setup, probe: Probe, processes: int, disturbed: Disturbed | None) -> None:
        self._disturbed = disturbed
        self._pool = None
        if disturbed is None:
            threads = max(1, len(os.sched_getaffinity(0)) // processes)
            self._pool = worker_pool(processes, _start, setup, probe, threads)

    def measure(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, ProbeFigures]]:
        """Each task with its figures, in the order in which they are done. Raises ModelError where a process was ended."""
        if self._pool is None:
            assert self._disturbed is not None
            yield from ((task, self._disturbed.figures(task)) for task in tasks)
            return
        begun: dict[Future[ProbeFigures], Task] = {self._pool.submit(_figures, task): task for task in tasks}
        try:
            for done in as_completed(begun):
                yield begun[done], done.result()
        except BrokenProcessPool as error:
            hint = "out of memory? --processes with a smaller number; the same command goes on"
            raise ModelError("a process that measures was ended by the system", hint=hint) from error

    def close(self) -> None:
        """End the processes; what they are at is waited for."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_worker: Disturbed | None = None


def _start(setup: Setup, probe: Probe, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = Disturbed.of(load_reader(setup.model, setup.dtype), setup, probe)


def _figures(task: Task) -> ProbeFigures:
    assert _worker is not None
    return _worker.figures(task)


def _perturbation(setup: Setup, weights: Weights) -> Perturbation:
    if setup.perturbation != "tuned":
        return {"noise": noise, "shrink": shrink}[setup.perturbation]
    assert setup.tuned is not None
    tuned = searched_weights(load_reader(ModelConfig(name=setup.tuned), setup.dtype), setup.layer)
    shapes = {unit: [weight.shape for weight in found] for unit, found in weights.items()}
    if shapes != {unit: [weight.shape for weight in found] for unit, found in tuned.items()}:
        hint = "of an adapter: guardtrain export RUN --to merged"
        raise ConfigError(
            "not a tuned version of this model", where=f"--tuned {setup.tuned}", expected="the same units", hint=hint
        )
    return towards(tuned)
