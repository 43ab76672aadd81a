"""Weights laid out by columns give what they gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from guardtrain.model import columns
from guardtrain.model.columns import SlicedLinear, hold_by_columns, num_slices

MakeTiny = Callable[..., Any]

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="not of use without MKL")


def lies_by_columns(weight: torch.Tensor) -> bool:
    return weight.stride() == (1, weight.shape[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("least", [8, 256], ids=["slices", "too narrow for slices"])
def test_the_model_says_the_same(
    make_tiny: MakeTiny, two_threads: None, kind: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "LEAST_COLUMNS", least)
    model = make_tiny(kind).eval()
    ids = torch.arange(3, 23).view(2, 10)
    before = model(ids).logits
    hold_by_columns(model)
    query = model.model.layers[0].self_attn.q_proj
    assert isinstance(query, SlicedLinear) if least == 8 else lies_by_columns(query.weight)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7)])
def test_a_sliced_layer_is_the_layer(shape: tuple[int, ...], has_bias: bool) -> None:
    layer, x = torch.nn.Linear(7, 12, bias=has_bias), torch.randn(shape)
    for slices in (1, 2, 3):
        torch.testing.assert_close(SlicedLinear(layer, slices)(x), layer(x))


def test_a_head_that_is_the_embedding_stays_it(make_tiny: MakeTiny, two_threads: None) -> None:
    model = make_tiny("llama", tied=True)
    hold_by_columns(model)
    assert lies_by_columns(model.lm_head.weight)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_other_types_and_kinds_of_layers_are_left_alone(make_tiny: MakeTiny) -> None:
    class Quantised(torch.nn.Linear):
        """Whatever has its own way of holding a weight."""

    half, model = make_tiny("llama").to(torch.bfloat16), make_tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj = Quantised(attention.k_proj.in_features, attention.k_proj.out_features, bias=False)
    hold_by_columns(half)
    hold_by_columns(model)
    assert not lies_by_columns(half.model.layers[0].mlp.up_proj.weight)
    assert not lies_by_columns(attention.k_proj.weight)
    assert lies_by_columns(attention.v_proj.weight)


@pytest.mark.parametrize(
    ("wide", "threads", "expected"), [(576, 2, 2), (192, 2, 1), (1536, 4, 4), (1536, 64, 6), (513, 2, 1), (1536, 1, 1)]
)
def test_slices_are_wide_and_alike(wide: int, threads: int, expected: int) -> None:
    assert num_slices(wide, threads) == expected
