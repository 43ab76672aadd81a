"""The search against planted ground truth: one carrier, redundant carriers, and every subset of few units."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from planted import PlantedModel, planted_prompts

from guardtrain.errors import ModelError
from guardtrain.secure.features import PromptFeatures
from guardtrain.secure.measure import Disturbed, fitted_probe
from guardtrain.secure.perturb import Perturbation, noise, shrink
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.prompts import Prompts
from guardtrain.secure.search import SEARCH, Losses, Search, ascending, grow
from guardtrain.secure.units import KINDS, Unit, unit_weights

TAU = 0.02


def disturbed(model: PlantedModel, perturbation: Perturbation = noise) -> Disturbed:
    ids, labels = planted_prompts(200)
    prompts = Prompts(ids, np.array(labels))
    features, probe = PromptFeatures(model, ids), fitted_probe(model, prompts, None)
    before = {SEARCH: probe.margins(features.read())}
    return Disturbed(unit_weights(model), perturbation, probe, {SEARCH: features}, {SEARCH: prompts}, before)


def searched(model: Disturbed, units: Sequence[Unit] = ()) -> tuple[Search, float]:
    search = Search(
        lambda tasks: [model.figures(task) for task in tasks], units or list(model.weights), seeds=(0, 1, 2), strongest=64.0
    )
    return search, search.breaking_strength()


def found(search: Search, strength: float) -> tuple[list[Unit], dict[Unit, Losses]]:
    alone = search.alone(strength)
    robust, joint = grow(ascending(alone), lambda some: search.drop(some, strength), TAU)
    assert joint == search.drop(robust, strength)
    return robust, alone


@pytest.mark.parametrize("carrier", [Unit(0, "v_proj"), Unit(2, "down_proj")])
def test_the_one_carrier_is_found(carrier: Unit) -> None:
    search, strength = searched(disturbed(PlantedModel(3, [carrier])))
    assert search.untouched.auroc == 1.0
    robust, alone = found(search, strength)
    assert set(alone) - set(robust) == {carrier}
    assert alone[carrier].drop > TAU >= max(losses.drop for unit, losses in alone.items() if unit != carrier)


def test_of_two_carriers_that_back_each_other_up_one_is_protected() -> None:
    carriers = [Unit(0, "v_proj"), Unit(1, "up_proj")]
    search, strength = searched(disturbed(PlantedModel(2, carriers), shrink))
    robust, alone = found(search, strength)
    assert max(losses.drop for losses in alone.values()) <= TAU, "alone, each looks robust"
    assert len(set(carriers) & set(robust)) == 1
    assert len(robust) == len(alone) - 1, "and nothing else is protected"
    assert search.drop(robust, strength) <= TAU < search.drop([*robust, *carriers], strength)


@pytest.mark.parametrize("carriers", [[Unit(0, "k_proj")], [Unit(0, "k_proj"), Unit(1, "o_proj")]])
def test_on_few_units_no_larger_set_is_robust(carriers: list[Unit]) -> None:
    """Greedy growth against every one of the 256 subsets."""
    units = [Unit(layer, kind) for layer in range(2) for kind in KINDS[:4]]
    search, strength = searched(disturbed(PlantedModel(2, carriers), shrink), units)
    robust, _ = found(search, strength)
    subsets = itertools.chain.from_iterable(itertools.combinations(units, size) for size in range(len(units) + 1))
    largest = max((some for some in subsets if search.drop(some, strength) <= TAU), key=len)
    assert len(robust) == len(largest)


def test_a_set_grows_to_the_last_unit_that_fits_and_asks_little() -> None:
    units = [Unit(layer, kind) for layer in range(30) for kind in KINDS]
    for fitting in (0, 1, 2, 15, 16, 17, 100, 127, 128, 209, 210):
        asked: list[int] = []

        def drop(some: Sequence[Unit], fitting: int = fitting, asked: list[int] = asked) -> float:
            asked.append(len(some))
            return 0.01 if len(some) <= fitting else 0.03

        robust, joint = grow(units, drop, TAU)
        assert robust == units[:fitting]
        assert joint == (0.01 if fitting else 0.0)
        assert len(asked) == len(set(asked)) <= 11


def test_strength_is_the_smallest_that_breaks_the_probe() -> None:
    def measure_with(edge: float) -> Search:
        good, bad = ProbeFigures(0.9, 0.9, 1.0, 0.9), ProbeFigures(0.7, 0.7, 0.2, 0.7)
        return Search(
            lambda tasks: [bad if task.strength >= edge else good for task in tasks],
            [Unit(0, "q_proj")],
            seeds=(0,),
            strongest=1.0,
        )

    for edge in (0.0001, 0.01, 0.3, 1.0):
        strength = measure_with(edge).breaking_strength()
        assert edge <= strength <= max(1.1 * edge, 2.0**-6 * 1.1)
    with pytest.raises(ModelError, match=r"nothing breaks the probe.*at strength 1$"):
        measure_with(1.5).breaking_strength()


def test_a_probe_that_knows_nothing_cannot_be_searched_with() -> None:
    with pytest.raises(ModelError, match="cannot tell malicious from benign"):
        Search(lambda tasks: [ProbeFigures(0.6, 0.55, 0.1, 0.55) for _ in tasks], [Unit(0, "q_proj")], seeds=(0,), strongest=1.0)
