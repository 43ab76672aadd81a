"""Parameters counted without loading any: the same numbers as those of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from guardtrain.config import ModelConfig
from guardtrain.errors import ConfigError, ModelError
from guardtrain.model.adapters import prepare_for_training, trainable_parameters
from guardtrain.model.load import load_model
from guardtrain.model.size import parameter_counts

METHODS = [
    {"method": "full"},
    {"method": "freeze", "trained_layers": 1},
    {"method": "lora", "lora_rank": 4},
    {"method": "lora", "lora_rank": 4, "lora_targets": ("q_proj", "v_proj")},
]


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_loaded_model(
    settings: dict[str, Any], tied: bool, make_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    make_tiny("qwen3", tied=tied).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), **settings)
    model = prepare_for_training(load_model(config, torch.float32), config)
    assert parameter_counts(config) == trainable_parameters(model)


def test_qlora_trains_what_lora_does(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    make_tiny("llama").save_pretrained(tmp_path)
    lora, qlora = (parameter_counts(ModelConfig(name=str(tmp_path), method=method, lora_rank=4)) for method in ("lora", "qlora"))
    assert lora == qlora


def test_a_wrong_target_is_found_before_weights_are_loaded(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    make_tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model.lora_targets"):
        parameter_counts(ModelConfig(name=str(tmp_path), method="lora", lora_targets=("no_such",)))


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        parameter_counts(ModelConfig(name=str(tmp_path)))
