"""Packed layers give what they gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from guardtrain.model.packed import PackedLinear, can_pack, pack_linear_layers

MakeTiny = Callable[..., Any]

pytestmark = pytest.mark.skipif(not can_pack(), reason="torch was built without MKL")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_model_says_the_same(make_tiny: MakeTiny, kind: str) -> None:
    model = make_tiny(kind).eval()
    ids = torch.arange(3, 23).view(2, 10)
    before = model(ids).logits
    pack_linear_layers(model)
    assert isinstance(model.model.layers[0].mlp.down_proj, PackedLinear)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (299, 7), (700, 7), (0, 7)])
def test_a_packed_layer_is_the_layer(shape: tuple[int, ...], has_bias: bool) -> None:
    layer, x = torch.nn.Linear(7, 12, bias=has_bias), torch.randn(shape)
    torch.testing.assert_close(PackedLinear(layer)(x), layer(x))


@torch.no_grad()
def test_rows_that_do_not_lie_side_by_side() -> None:
    layer, x = torch.nn.Linear(64, 48), torch.randn(64, 100, 3)
    for strided in (x[:, :, 1].t(), x[:, ::2, 1].t(), x.permute(1, 2, 0)):
        torch.testing.assert_close(PackedLinear(layer)(strided), layer(strided))


@torch.no_grad()
@pytest.mark.parametrize("has_bias", [True, False])
def test_layers_that_read_the_same_rows_stand_side_by_side(has_bias: bool) -> None:
    layers = [torch.nn.Linear(96, outputs, bias=has_bias) for outputs in (128, 32, 32)]
    for rows in (1, 5, 64, 400):
        x = torch.randn(rows, 96)
        torch.testing.assert_close(PackedLinear(*layers)(x), torch.cat([layer(x) for layer in layers], dim=-1))


def test_a_head_that_is_the_embedding_stays_it(make_tiny: MakeTiny) -> None:
    model = make_tiny("llama", tied=True)
    pack_linear_layers(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_other_types_and_kinds_of_layers_are_left_alone(make_tiny: MakeTiny) -> None:
    class Quantised(torch.nn.Linear):
        """Whatever has its own way of holding a weight."""

    half, model = make_tiny("llama").to(torch.bfloat16), make_tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj = quantised = Quantised(attention.k_proj.in_features, attention.k_proj.out_features, bias=False)
    pack_linear_layers(half)
    pack_linear_layers(model)
    assert type(half.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert attention.k_proj is quantised
    assert type(attention.v_proj) is PackedLinear
