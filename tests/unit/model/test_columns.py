"""Weights laid out by columns are the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from guardtrain.model.columns import hold_by_columns

MakeTiny = Callable[..., Any]

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="not of use without MKL")


def lies_by_columns(weight: torch.Tensor) -> bool:
    return weight.stride() == (1, weight.shape[0])


@torch.no_grad()
def test_the_model_says_the_same(make_tiny: MakeTiny) -> None:
    model = make_tiny("llama").eval()
    ids = torch.arange(3, 20)[None]
    before, weights = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    hold_by_columns(model)
    assert all(lies_by_columns(layer.self_attn.q_proj.weight) for layer in model.model.layers)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_head_that_is_the_embedding_stays_it(make_tiny: MakeTiny) -> None:
    model = make_tiny("llama", tied=True)
    hold_by_columns(model)
    assert lies_by_columns(model.lm_head.weight)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_other_types_and_kinds_of_layers_are_left_alone() -> None:
    class Quantised(torch.nn.Linear):
        """Whatever has its own way of holding a weight."""

    half, other, wide = torch.nn.Linear(4, 6).to(torch.bfloat16), Quantised(4, 6), torch.nn.Linear(4, 6, bias=False)
    hold_by_columns(torch.nn.Sequential(half, other, wide))
    assert [lies_by_columns(layer.weight) for layer in (half, other, wide)] == [False, False, True]
