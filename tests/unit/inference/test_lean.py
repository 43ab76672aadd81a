"""The forward for serving gives what transformers' own gives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build_windowed
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from guardtrain.inference import lean
from guardtrain.inference.decoder import TreeDecoder
from guardtrain.inference.lean import is_covered, make_lean, parts_of
from guardtrain.inference.rows import ATTENTION
from guardtrain.model.packed import can_pack

MakeTiny = Callable[..., Any]

pytestmark = pytest.mark.skipif(not can_pack(), reason="torch was built without MKL")
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
PROMPTS = [list(range(3, 3 + length)) for length in (1, 9, 30, 4)]


def models() -> dict[str, Callable[[], Any]]:
    stretched = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretched["original_max_position_embeddings"] = 16
    return {
        "llama with biases of attention": lambda: LlamaForCausalLM(LlamaConfig(attention_bias=True, **SIZES)),
        "llama with stretched positions": lambda: LlamaForCausalLM(LlamaConfig(rope_parameters=stretched, **SIZES)),
        "llama whose heads are wider than its tokens": lambda: LlamaForCausalLM(LlamaConfig(head_dim=24, **SIZES)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "qwen2 with a window": lambda: build_windowed("qwen2", vocab_size=99, window=6),
    }


def filled(model: Any) -> Any:
    """With random biases and norms, which are zeros and ones in a new model."""
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.3)
    model.set_attn_implementation(ATTENTION)
    return model.float().eval()


def said(model: Any) -> torch.Tensor:
    """The logits behind prompts that are read together, then behind their forks."""
    decoder = TreeDecoder(model, list(range(40, 47)))
    decoder.start(len(PROMPTS))
    forks = {decoder.fork(branch, 1)[0]: [5, 6] for branch in range(len(PROMPTS))}
    tokens = {key: ids for branch, fork in enumerate(forks) for key, ids in ((branch, PROMPTS[branch]), (fork, forks[fork]))}
    first = decoder.extend(tokens, heads=list(forks))
    return torch.cat([first, decoder.extend({fork: [7] for fork in forks})])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", *models()])
@pytest.mark.parametrize("part", [1, 16, 10_000], ids=["each prompt", "some prompts", "all prompts"])
def test_the_logits_are_the_same(make_tiny: MakeTiny, kind: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "PART_TOKENS", part)
    torch.manual_seed(7)
    model = filled(models()[kind]() if kind in models() else make_tiny(kind))
    expected = said(model)
    assert make_lean(model)
    assert expected.std() > 0.1
    torch.testing.assert_close(said(model), expected, atol=2e-5, rtol=1e-4)


def test_prompts_that_are_read_together_are_cut_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "PART_TOKENS", 3)
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    policy = torch.ones(len(owner), 2, dtype=torch.bool)
    mask = torch.cat([policy, (owner[:, None] == owner) & torch.ones(8, 8).tril().bool()], dim=1)[None, None]
    parts = parts_of(mask)
    assert [part for part, _, _ in parts] == [slice(0, 5), slice(5, 8)]
    assert [seen.tolist() for _, seen, _ in parts] == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 7, 8, 9]]
    for part, seen, added in parts:
        assert added is not None
        assert torch.equal(added == 0, mask[:, :, part, seen])
    assert sum(int((added == 0).sum()) for _, _, added in parts if added is not None) == int(mask.sum()), "nothing seen is lost"


def test_what_is_not_covered_is_left_alone(make_tiny: MakeTiny) -> None:
    class Quantised(torch.nn.Linear):
        """Whatever has its own way of holding a weight."""

    other_layer = make_tiny("llama")
    other_layer.model.layers[1].mlp.up_proj = Quantised(32, 64, bias=False)
    others = {
        "bfloat16": make_tiny("llama").to(torch.bfloat16),
        "a layer of another kind": other_layer,
        "biases in the MLP": LlamaForCausalLM(LlamaConfig(mlp_bias=True, **SIZES)),
        "another activation": LlamaForCausalLM(LlamaConfig(hidden_act="gelu", **SIZES)),
        "another architecture": build_windowed("gemma3", vocab_size=99, window=6),
    }
    for name, model in others.items():
        layer = model.model.layers[0]
        assert not is_covered(model), name
        assert not make_lean(model), name
        assert model.model.layers[0] is layer
    assert is_covered(make_tiny("llama"))


def test_the_head_that_is_the_embedding_stays_it(make_tiny: MakeTiny) -> None:
    model = make_tiny("llama", tied=True)
    assert make_lean(model)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_no_weight_is_held_twice(make_tiny: MakeTiny) -> None:
    model = make_tiny("qwen3")
    held = [weakref.ref(weight) for name, weight in model.named_parameters() if "proj" in name]
    assert len(held) == 7 * 2
    assert make_lean(model)
    gc.collect()
    assert not any(weight() is not None for weight in held)
