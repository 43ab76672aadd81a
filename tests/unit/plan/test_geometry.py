"""Counts from a config.json against the models that transformers builds from it, and against what DeepSpeed makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from guardtrain.config import ModelConfig
from guardtrain.errors import ConfigError
from guardtrain.model.adapters import prepare_for_training, trainable_parameters
from guardtrain.plan.geometry import MODELS, geometry_of, read_geometry, shipped_models
from guardtrain.plan.states import partition_elements

# As their publishers count them, in billions.
PUBLISHED = {
    "smollm2-135m": 0.1345,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.1-405b": 405.9,
}


def on_meta(tree: dict[str, Any]) -> Any:
    """The model that transformers builds from a config, without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = dict(tree)
    config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shipped_tree(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())
    return tree


def test_every_shipped_model_has_a_published_count() -> None:
    assert set(shipped_models()) == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_counts_are_those_of_the_built_model(name: str) -> None:
    geometry = read_geometry(name)
    model = on_meta(shipped_tree(name))
    assert geometry.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert geometry.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.003)
    layer = model.model.layers[0]
    assert geometry.parameters_of_a_layer == sum(parameter.numel() for parameter in layer.parameters())
    assert geometry.embedding_parameters == model.lm_head.weight.numel()


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("down_proj",)])
@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama-3.1-8b"])
def test_adapters_are_those_that_peft_makes(name: str, targets: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = on_meta(shipped_tree(name))
        adapted = prepare_for_training(model, ModelConfig(method="lora", lora_rank=16, lora_targets=targets))
    assert read_geometry(name).lora_parameters(16, targets) == trainable_parameters(adapted)[0]


@pytest.mark.parametrize("ranks", [128, 256])
def test_partitions_of_405b_are_those_of_deepspeed(ranks: int) -> None:
    from deepspeed.runtime.zero.partition_parameters import Init

    partitioner = SimpleNamespace(_partition_world_size=lambda parameter: ranks)
    partitioner._padding_size = lambda parameter: Init._padding_size(partitioner, parameter)
    expected = 0
    for parameter in on_meta(shipped_tree("llama-3.1-405b")).parameters():
        parameter.ds_numel = parameter.numel()
        expected += Init._aligned_size(partitioner, parameter) // ranks
    geometry = read_geometry("llama-3.1-405b")
    assert partition_elements(geometry, ranks) == expected
    assert expected * ranks == pytest.approx(geometry.parameters, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "geometry"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("Qwen/Qwen3-0.6B-Base", "qwen3-0.6b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-405B", "llama-3.1-405b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ],
)
def test_names_of_published_models_are_known(model: str, geometry: str) -> None:
    assert read_geometry(model).parameters == read_geometry(geometry).parameters


def test_a_folder_and_a_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shipped_tree("qwen3-4b")))
    for model in (tmp_path, tmp_path / "config.json"):
        assert read_geometry(str(model)).parameters == read_geometry("qwen3-4b").parameters


def test_what_a_config_leaves_out_has_the_usual_meaning() -> None:
    tree = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 10}
    geometry = geometry_of({"text_config": tree}, name="x", where="x")
    assert (geometry.num_kv_heads, geometry.head_dim, geometry.tied) == (4, 16, False)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({}, "hidden_size is None"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_experts": 64}, "mixture of experts"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ([], "an object"),
    ],
)
def test_a_config_that_does_not_do_says_what_is_wrong(tree: Any, said: str, tmp_path: Path) -> None:
    base = shipped_tree("qwen3-0.6b") if tree else {}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**base, **tree} if isinstance(tree, dict) else tree))
    with pytest.raises(ConfigError, match=said) as caught:
        read_geometry(str(tmp_path))
    assert str(path) in str(caught.value)


def test_an_unknown_model_and_broken_json_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model"):
        read_geometry("acme/unknown-7b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json:1"):
        read_geometry(str(tmp_path))
