"""Each control is a change of one recipe, and of nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from guardtrain.compare.controls import CONTROLS, DEFAULT, check_recipe, chosen, recipe_of
from guardtrain.config import Recipe, Source
from guardtrain.errors import ConfigError
from guardtrain.overrides import load_recipe


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("instruct", ["secure.modules=modules.json"])


def test_without_a_list_there_are_the_nine_of_the_question() -> None:
    assert set(chosen(None)) == set(DEFAULT)
    assert len(DEFAULT) == 9


def test_what_is_matched_is_trained_after_what_it_is_matched_to() -> None:
    assert chosen("norm-matched,untuned, mllr,ordinary") == ("untuned", "ordinary", "mllr", "norm-matched")
    assert chosen("score-matched,mllr,untuned,ordinary") == ("untuned", "ordinary", "mllr", "score-matched")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("ordinary,typo", "found typo"),
        ("ordinary,ordinary", "found one twice"),
        ("untuned,mllr", "no ordinary"),
        ("ordinary,norm-matched", "no mllr"),
        ("ordinary,mllr,score-matched", "no untuned"),
    ],
)
def test_a_list_that_cannot_be_compared_is_refused(names: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        chosen(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ordinary", {"method": "off"}),
        ("mllr", {"method": "mllr"}),
        ("reversed", {"method": "mllr", "reversed": True}),
        ("random-subset", {"method": "mllr", "random_subset": 19}),
        ("warmup", {"method": "warmup"}),
        ("ptst", {"method": "off", "template_at_inference_only": True}),
    ],
)
def test_a_control_changes_what_it_says_and_nothing_else(recipe: Recipe, name: str, expected: dict[str, Any]) -> None:
    made = recipe_of(recipe, name, 19, Path("runs/x"), rate_factor=0.5)
    assert made.secure == dataclasses.replace(recipe.secure, **expected)
    assert made.train == dataclasses.replace(recipe.train, seed=19, learning_rate=recipe.train.learning_rate / 2)
    assert made.run_dir == "runs/x"
    assert (made.model, made.data, made.task) == (recipe.model, recipe.data, recipe.task)


def test_every_control_makes_a_valid_recipe(recipe: Recipe) -> None:
    settings = {"frozen_layers": (0, 1), "base_model": "base", "safety_data": (Source(path="refusals.jsonl"),)}
    whole = dataclasses.replace(
        recipe, secure=dataclasses.replace(recipe.secure, **settings), model=dataclasses.replace(recipe.model, method="lora")
    )
    check_recipe(whole, tuple(CONTROLS))


def test_what_a_control_lacks_is_said_before_anything_trains(recipe: Recipe) -> None:
    without = dataclasses.replace(recipe, secure=dataclasses.replace(recipe.secure, modules=None))
    with pytest.raises(ConfigError, match=r"control mllr: secure\.modules"):
        check_recipe(without, ("ordinary", "mllr"))
    check_recipe(without, ("ordinary",))


def test_guards_and_recipes_with_a_method_are_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"task.kind.*instruct"):
        check_recipe(load_recipe("guard"), ("ordinary",))
    with pytest.raises(ConfigError, match=r"secure.method.*mllr"):
        check_recipe(dataclasses.replace(recipe, secure=dataclasses.replace(recipe.secure, method="mllr")), ("ordinary",))
