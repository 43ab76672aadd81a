"""Every shipped recipe: valid, planned onto the hardware that it names, with the planner's figures in its head."""

from __future__ import annotations

import re

import pytest
from recipe_heads import CLUSTER, GOLDEN, RECIPES, clusters, dry_run, figures, head, planned, planned_recipes

from guardtrain.overrides import load_recipe

EXPECTED = {
    *(f"qwen3-0.6b-{kind}" for kind in ("qlora", "lora", "full", "base-labels", "instruct-labels")),
    *(f"llama31-8b-{kind}" for kind in ("qlora", "lora", "full", "instruct-qlora")),
    *(f"llama31-70b-{kind}" for kind in ("qlora", "lora", "full", "instruct-lora")),
    *(f"llama31-405b-{kind}" for kind in ("lora", "full")),
}


def test_no_recipe_is_missing() -> None:
    assert set(planned_recipes()) == EXPECTED


@pytest.mark.parametrize("recipe", sorted(EXPECTED))
def test_it_is_valid_and_fits_the_hardware_that_it_names(recipe: str) -> None:
    assert list(load_recipe(recipe).problems()) == []
    named = clusters(recipe)
    assert named
    for cluster in named:
        assert planned(recipe, cluster).problem is None, cluster


@pytest.mark.parametrize("recipe", sorted(EXPECTED))
def test_its_head_has_the_planners_figures(recipe: str) -> None:
    """`python tests/recipe_heads.py` writes them; a figure that was measured says so instead."""
    said = head(recipe)
    for word, figure in figures(recipe).items():
        assert said[word] == figure or said[word].startswith("measured"), word
    assert said["score"]


@pytest.mark.parametrize("recipe", sorted(EXPECTED))
def test_its_command_starts_what_the_golden_file_says(recipe: str) -> None:
    assert head(recipe)["command"].split()[2] == recipe
    assert dry_run(recipe) == (GOLDEN / f"{recipe}.txt").read_text("utf-8")


@pytest.mark.parametrize("recipe", sorted(EXPECTED))
def test_its_packs_can_be_shared_out_on_every_cluster_that_it_names(recipe: str) -> None:
    packs = load_recipe(recipe).train.packs_per_step
    for cluster in clusters(recipe):
        nodes, gpus = map(int, re.findall(r"(\d+)x", cluster)[:2])
        assert packs % (nodes * gpus) == 0, cluster


def test_no_recipe_gathers_a_large_model_in_one_place() -> None:
    for path in GOLDEN.glob("llama31-[47]*.txt"):
        assert '"stage3_gather_16bit_weights_on_model_save": true' not in path.read_text("utf-8")


def test_the_clusters_of_the_heads_are_found() -> None:
    text = (RECIPES / "llama31-70b-full.yaml").read_text("utf-8")
    assert re.findall(CLUSTER, text) == ["4x8xH100-80GB", "8x8xH100-80GB"]
