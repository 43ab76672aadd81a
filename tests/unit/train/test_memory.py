"""Advice for a run that does not fit: settings of this recipe, with numbers."""

from __future__ import annotations

import pytest
import torch

from guardtrain.overrides import load_recipe
from guardtrain.train.memory import advice, is_out_of_memory

BILLION = 10**9


def given(*overrides: str, trained: int = 8 * BILLION, ranks: int = 1, zero_stage: int = 0) -> list[str]:
    recipe = load_recipe("quickstart", list(overrides))
    return list(advice(recipe, trained, 8 * BILLION, ranks=ranks, zero_stage=zero_stage))


def test_the_gentlest_comes_first() -> None:
    lines = given("model.method=full", "train.pack_tokens=4096", "train.gradient_checkpointing=false")
    assert [line.split("=")[0] for line in lines] == ["train.gradient_checkpointing", "train.pack_tokens", "model.method"]
    assert "train.pack_tokens=2048" in lines[1]
    assert "14.9 GiB for the weights and little else, instead of 119.2 GiB" in lines[2]


def test_what_is_used_already_is_not_advised() -> None:
    lines = given("model.method=lora", "train.pack_tokens=256", "train.gradient_checkpointing=true", trained=10**7)
    assert [line.split(" ")[0] for line in lines] == ["model.method=qlora"]


def test_several_ranks_share_and_then_offload() -> None:
    shared = given("model.method=full", ranks=8, zero_stage=2)
    assert any("zero3 keeps 14.9 of 119.2 GiB" in line for line in shared)
    split = given("model.method=full", ranks=8, zero_stage=3)
    assert any("zero3_offload moves 14.9 GiB a rank" in line for line in split)
    assert not any("=zero3 " in line for line in split)


def test_errors_of_memory() -> None:
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(info.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("a shape"))
