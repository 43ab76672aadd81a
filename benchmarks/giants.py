"""Models of a shipped geometry with random weights, made where they train: what takes memory and time does not depend on them.

Weights of 70 billion parameters are never on disk or in the host's memory here: one matrix at a time is drawn on the device and,
for QLoRA, quantised there by bitsandbytes as a real load would.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from guardtrain.config import ModelConfig
from guardtrain.json_files import read_object
from guardtrain.model.load import nf4_settings, ready
from guardtrain.plan.geometry import MODELS

SCALE = 0.02
# So that a rehearsal without a GPU takes seconds.
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def write_giant(folder: Path, name: str, tokenizer: Path, *, layers: int | None, is_tiny: bool) -> None:
    """A folder with a configuration and a tokenizer and no weights. name: of a shipped geometry; layers: None for all its own."""
    from transformers import AutoConfig

    geometry = {**read_object(MODELS / f"{name}.json", "a model's configuration"), "max_position_embeddings": 131_072}
    if layers is not None or is_tiny:
        geometry["num_hidden_layers"] = layers or 2
    config = AutoConfig.for_model(geometry.pop("model_type"), **{**geometry, **(TINY if is_tiny else {})})
    config.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)


def random_model(config: ModelConfig, weights_dtype: torch.dtype, *, quantized: bool = False, attention: str = "sdpa") -> Any:
    """In place of `guardtrain.model.load.load_model`: what the folder `config.name` describes, on the GPU if there is one."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    geometry = AutoConfig.from_pretrained(config.name)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(geometry, dtype=weights_dtype, attn_implementation=attention)
    if quantized:
        quantizer = AutoHfQuantizer.from_config(nf4_settings(weights_dtype))
        quantizer.preprocess_model(model=model, device_map={"": device}, dtype=weights_dtype)
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _drawn(parameter, weights_dtype, device))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    model.tie_weights()
    if quantized:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer  # as from_pretrained leaves it: the trainer asks it whether it can train
    return ready(model, config, attention)


def _drawn(parameter: torch.nn.Parameter, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """Random numbers in place of a parameter without any; in 4 bits where it is to be."""
    values = torch.randn(parameter.shape, dtype=dtype, device=device).mul_(SCALE)
    if not hasattr(parameter, "quant_type"):
        return torch.nn.Parameter(values)
    import bitsandbytes as bnb

    kinds = {name: getattr(parameter, name) for name in ("quant_type", "compress_statistics", "blocksize", "quant_storage")}
    return bnb.nn.Params4bit(values, requires_grad=False, **kinds).to(device)
