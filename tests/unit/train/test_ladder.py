"""The three attempts differ in what the ladder compares, and in nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from guardtrain.config import Recipe
from guardtrain.errors import ConfigError
from guardtrain.evaluate.bootstrap import with_intervals
from guardtrain.evaluate.scores import Judged
from guardtrain.overrides import build_recipe
from guardtrain.train.ladder import ENGINEERED, LABELS, REASONED, Rung, attempts, ladder_table, load_traps, write_ladder
from guardtrain.types import Label


def recipe(**task: object) -> Recipe:
    tree = {"task": {"kind": "guard", **task}, "data": {"train": ["starter"]}, "output": {"dir": "runs/climb"}}
    return build_recipe(tree, [], name="climb", where="climb")


def test_the_attempts_share_rows_and_training() -> None:
    found = attempts(recipe(), base="some/base")
    assert list(found) == [LABELS, ENGINEERED, REASONED]
    for attempt in found.values():
        assert (attempt.data, attempt.train, attempt.evaluate) == (recipe().data, recipe().train, recipe().evaluate)
    assert [attempt.model.name for attempt in found.values()] == ["some/base", "smollm2-135m", "smollm2-135m"]
    assert [attempt.task.modes for attempt in found.values()] == [("off",), ("off",), ("off", "on")]
    assert found[LABELS].task.policy == found[REASONED].task.policy == recipe().task.policy
    assert "careful security analyst" in found[ENGINEERED].task.policy
    assert [Path(attempt.run_dir).parts[-2:] for attempt in found.values()] == [
        ("climb", "labels"),
        ("climb", "engineered"),
        ("climb", "reasoned"),
    ]
    assert found[REASONED].task == recipe().task


def test_without_a_base_model_the_first_attempt_takes_the_recipes_own() -> None:
    assert attempts(recipe())[LABELS].model == recipe().model


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (recipe(modes=["off"]), "reasoned guard"),
        (dataclasses.replace(recipe(), task=dataclasses.replace(recipe().task, kind="instruct")), "reasoned guard"),
        (
            build_recipe({"task": "guard", "data": {"train": ["starter-hard"]}}, [], name="x", where="x"),
            "traps would be training",
        ),
    ],
)
def test_a_recipe_without_that_end_is_refused(wrong: Recipe, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attempts(wrong)


def test_the_traps_are_harmless_rows_about_prompts_and_instructions() -> None:
    traps = load_traps()
    assert len(traps) == 80
    assert {row.label for row in traps} == {Label.BENIGN}
    assert {row.category for row in traps} == {"system_prompt_extraction", "instruction_override"}


def rungs() -> list[Rung]:
    rng = np.random.default_rng(0)
    labels_N = np.arange(80) < 40
    names = [(LABELS, "off"), (ENGINEERED, "off"), (REASONED, "off"), (REASONED, "on"), (REASONED, "both")]
    return [
        Rung(
            attempt=attempt,
            mode=mode,
            model="m",
            folder=Path("runs/x"),
            measures=with_intervals(Judged(scores_N=rng.normal(labels_N * n, 1.0), is_malicious_N=labels_N), samples=50),
            traps=0.5 / (n + 1),
            num_traps=80,
            seconds=60.0 * (n + 1),
        )
        for n, (attempt, mode) in enumerate(names)
    ]


def test_table_file_and_picture_hold_every_rung(tmp_path: Path) -> None:
    assert len(ladder_table(rungs()).rows) == 5
    write_ladder(rungs(), tmp_path)
    saved = json.loads((tmp_path / "ladder.json").read_text())
    assert [(each["attempt"], each["mode"]) for each in saved] == [(rung.attempt, rung.mode) for rung in rungs()]
    assert saved[0]["measures"]["intervals"]["recall_at_1_fpr"]
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
