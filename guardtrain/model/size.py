"""How large a model is, before any of its weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from guardtrain.config import ModelConfig
from guardtrain.model.adapters import prepare_for_training, trainable_parameters
from guardtrain.model.load import loading_errors, resolve


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """(trained, all) parameters of `config`'s model under its method; those below 4-bit adapters counted whole.

    Reads the model's configuration and allocates nothing. Raises ModelError, and ConfigError for targets that are not there.
    """
    from transformers import AutoModelForCausalLM

    with loading_errors(config.name, "model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_architecture(config))
    method = "lora" if config.method == "qlora" else config.method
    with torch.device("meta"):
        return trainable_parameters(prepare_for_training(model, replace(config, method=method)))


def _architecture(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    source = resolve(config.name)
    gguf = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    return AutoConfig.from_pretrained(source.path, revision=config.revision or "main", **gguf)
