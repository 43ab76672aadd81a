"""Tokens that are estimated from characters, against those that a tokenizer counts."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from guardtrain.config import Recipe
from guardtrain.data.packing import Segment
from guardtrain.data.template import GuardTemplate
from guardtrain.errors import ConfigError
from guardtrain.overrides import load_recipe
from guardtrain.plan.workload import Workload, workload_of
from guardtrain.train.rows import build_stream, build_template, build_tree, load_rows, modes_of


def supervised(segment: Segment) -> int:
    return sum(1 for weight in segment.weights if weight) + sum(map(supervised, segment.children))


def check(recipe: Recipe, tokenizer: Any) -> Workload:
    """Rows, their tokens and the supervised among them within a tenth of what is counted."""
    template = build_template(tokenizer, recipe.task)
    rows = load_rows(recipe, template)
    trees = [build_tree(template, row, modes_of(row, recipe.task, recipe.train.seed)) for row in rows.train]
    found = workload_of(recipe)
    assert found.rows == pytest.approx(len(rows.train), rel=0.02)
    assert found.row_tokens == pytest.approx(mean(map(len, trees)), rel=0.1)
    assert found.supervised_tokens == pytest.approx(mean(map(supervised, trees)), rel=0.1)
    if isinstance(template, GuardTemplate):
        assert found.policy_tokens == pytest.approx(len(template.policy_ids), rel=0.1)
    return found


@pytest.mark.parametrize("overrides", [["task.on_share=1"], ["task.on_share=0.25"], ["task.modes=[on]", "task.on_share=1"]])
def test_guard_rows(overrides: list[str], smol_tokenizer: Any) -> None:
    recipe = load_recipe("guard", overrides)
    found = check(recipe, smol_tokenizer)
    stream = build_stream(recipe, *_of(recipe, smol_tokenizer))
    assert stream.num_steps == pytest.approx(found.steps(recipe.train.pack_tokens, 1), rel=0.1)


def _of(recipe: Recipe, tokenizer: Any) -> tuple[Any, Any]:
    template = build_template(tokenizer, recipe.task)
    return template, load_rows(recipe, template)


@pytest.mark.shared_data
def test_real_prompts(shared_data: Path, smol_tokenizer: Any) -> None:
    source = f"data.train=[{{path: {shared_data / 'train.jsonl'}, reasons: {shared_data / 'reasons.jsonl'}}}]"
    check(load_recipe("guard", [source, "data.max_prompt_tokens=100000", "task.on_share=1"]), smol_tokenizer)


def test_rows_that_are_elsewhere_are_of_the_usual_length() -> None:
    found = workload_of(load_recipe("guard", ["data.train=acme/prompts"]), rows=1000)
    assert found.rows == 1000
    assert 80 < found.row_tokens < 160
    with pytest.raises(ConfigError, match="--rows"):
        workload_of(load_recipe("guard", ["data.train=acme/prompts"]))


def test_data_without_a_row_say_why(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1"):
        workload_of(load_recipe("guard", [f"data.train={path}"]))


def test_instruct_rows_have_no_policy(tmp_path: Path, smol_tokenizer: Any) -> None:
    path = tmp_path / "qa.jsonl"
    answer = "A buffer overflow writes past the end of a memory block, and an attacker may choose what is written there. " * 3
    path.write_text(
        "".join(f'{{"question": "What is a buffer overflow, case {n}?", "answer": "{n} {answer}"}}\n' for n in range(40))
    )
    found = check(load_recipe("instruct", [f"data.train={path}"]), smol_tokenizer)
    assert found.policy_tokens == 0


def test_packs_are_whole_steps_and_hold_whole_rows() -> None:
    work = Workload(rows=100, row_tokens=100, supervised_tokens=10, policy_tokens=24, epochs=1, said="")
    assert work.rows_of_pack(1024) == pytest.approx(9.6)
    assert work.steps(1024, 4) == 3
    assert work.pack(1024, is_padded=True).supervised_tokens == 96
    assert work.pack(1024, is_padded=True).tokens == 1024
    assert work.pack(1024, is_padded=False).tokens == 984
    with pytest.raises(ConfigError, match="at least 124"):
        work.pack(120, is_padded=True)
