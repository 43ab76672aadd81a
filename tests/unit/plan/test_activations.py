"""The planner's formulas against the tensors that real models keep: every method and format, one layer at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import build_tiny

from guardtrain.bench.account import TensorAccount
from guardtrain.config import ModelConfig
from guardtrain.data.collate import Collator
from guardtrain.data.packing import Segment, layout
from guardtrain.model import loss as loss_module
from guardtrain.model.adapters import prepare_for_training
from guardtrain.model.attention import attention_windows, choose_backend, sdpa
from guardtrain.model.loss import chunkable_head, pack_loss_sum
from guardtrain.plan import activations
from guardtrain.plan import setup as shape
from guardtrain.plan.geometry import Geometry, geometry_of
from guardtrain.plan.setup import Engine, PackShape, Setup

VOCABULARY, ROOT, ROWS, SUPERVISED = 2048, 64, 4, 16
ENGINE = Engine(
    stage=2,
    reduce_bucket=0,
    allgather_bucket=0,
    prefetch_bucket=0,
    persistence_threshold=0,
    reuse_distance=0,
    sub_group=0,
    overlaps=True,
    offload_optimizer=None,
    offload_weights=None,
    hpz_ranks=1,
)
# name: (method, format of the weights, of what trains, whether autocast is on)
FORMATS = {
    "full in float32": ("full", torch.float32, torch.float32, False),
    "full under autocast": ("full", torch.float32, torch.float32, True),
    "full in bfloat16": ("full", torch.bfloat16, torch.bfloat16, False),
    "adapters in float32": ("lora", torch.float32, torch.float32, False),
    "adapters under autocast": ("lora", torch.bfloat16, torch.float32, True),
    "adapters in bfloat16": ("lora", torch.bfloat16, torch.bfloat16, False),
}


def setup_like(name: str, *, tokens: int, row_tokens: int, checkpointing: bool, targets: tuple[str, ...]) -> Setup:
    method, weights, trained, autocast = FORMATS[name]
    return Setup(
        method=method,  # type: ignore[arg-type]
        pack=PackShape(
            budget=tokens, tokens=tokens, root_tokens=ROOT, supervised_tokens=ROWS * SUPERVISED, row_tokens=row_tokens
        ),
        gradient_checkpointing=checkpointing,
        compute="bfloat16" if autocast or weights is torch.bfloat16 else "float32",
        attention="sdpa",
        engine=ENGINE if trained is torch.bfloat16 else None,
        lora_targets=targets,
    )


def kept(kind: str, num_layers: int, name: str, *, checkpointing: bool, targets: tuple[str, ...]) -> tuple[int, int, Any]:
    """(tokens of the pack, bytes that live after the forward and did not before, the model's configuration)."""
    method, weights, trained, autocast = FORMATS[name]
    backend, _ = choose_backend("sdpa", device="cpu", dtype=torch.float32)
    with TensorAccount() as account:
        model = build_tiny(kind, vocab_size=VOCABULARY, num_layers=num_layers, hidden_size=128).to(weights)
        model.set_attn_implementation(backend.registered_name)
        config = ModelConfig(method=method, lora_targets=targets)  # type: ignore[arg-type]
        model = prepare_for_training(model, config, trained).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        length = 90
        row = Segment(list(range(5, 5 + length)), [0.0] * (length - SUPERVISED) + [1.0] * SUPERVISED)
        pack = layout([Segment.unsupervised(list(range(5, 5 + ROOT)), [row] * ROWS)])
        inputs = Collator(lambda tree: backend.plan(tree, attention_windows(model.config)))([pack])
        for parameter in model.parameters():
            parameter.data.add_(0)  # seen, so that it does not count as kept
        before = account.live
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = pack_loss_sum(model, inputs, chunkable_head(model))
        found = account.live - before
        del loss
    return len(pack), found, model.config


def geometry_like(config: Any) -> Geometry:
    return geometry_of(config.to_dict(), name="tiny", where="tiny")


@pytest.mark.parametrize(
    ("kind", "name", "checkpointing"),
    [*itertools.product(("qwen3", "llama"), FORMATS, (False,)), ("qwen3", "full in float32", True)],
)
def test_a_layer_keeps_what_the_formula_says(kind: str, name: str, checkpointing: bool) -> None:
    check_layer(kind, name, checkpointing=checkpointing, targets=("all-linear",))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("o_proj", "gate_proj")])
@pytest.mark.parametrize("name", ["adapters in float32", "adapters under autocast"])
def test_adapters_on_some_matrices_keep_less(name: str, targets: tuple[str, ...]) -> None:
    check_layer("qwen3", name, checkpointing=False, targets=targets)


def check_layer(kind: str, name: str, *, checkpointing: bool, targets: tuple[str, ...]) -> None:
    """One layer more keeps one layer more: within 2 %, of which the lengths of attention's blocks are most."""
    tokens, two, config = kept(kind, 2, name, checkpointing=checkpointing, targets=targets)
    _, four, _ = kept(kind, 4, name, checkpointing=checkpointing, targets=targets)
    geometry = geometry_like(config)
    setup = setup_like(name, tokens=tokens, row_tokens=90, checkpointing=checkpointing, targets=targets)
    one = activations.kept_when_checkpointed if checkpointing else activations.kept_by_layer
    casts = 0
    if setup.autocasts and not checkpointing:  # they live in the forward, and are counted with the weights
        one_layer = replace(geometry, num_layers=1)
        matrices = one_layer.lora_parameters(16, targets) if setup.is_adapter else geometry.linear_parameters_of_a_layer
        casts = 2 * matrices
    assert one(geometry, setup) + casts == pytest.approx((four - two) / 2, rel=0.02)


def test_the_constants_are_those_of_the_code_that_they_describe() -> None:
    assert shape.CHUNK_ELEMENTS == loss_module.CHUNK_ELEMENTS
    assert shape.CHUNK_TOKENS_OF_A_TRAINED_HEAD == loss_module.CHUNK_TOKENS_OF_A_TRAINED_HEAD
    assert shape.BLOCK_TOKENS == sdpa.BLOCK_TOKENS
