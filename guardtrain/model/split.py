"""A model that no rank ever holds whole, for ZeRO-3: what its files hold is found, it is built empty, filled, and finished.

2026-11: under ZeRO-3 `from_pretrained` of transformers 5.23 has the main rank read all files before it shares out the first
weight, and sends every weight twice through the network. Here each rank reads its own share, and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from guardtrain.config import ModelConfig
from guardtrain.errors import ModelError
from guardtrain.model.load import ModelSource, loading_errors, ready, require_all_weights, resolve
from guardtrain.model.stored import StoredWeight, read_header


@dataclass(frozen=True)
class StoredModel:
    """A model on disk, of which every weight was found.

    settings, generation: transformers' configurations. dtype: what its weights shall be held in. weights: by the model's own
    names. absent: the model's names of weights that are tied to one of those. conversions: transformers' renamings of them.
    """

    config: ModelConfig
    settings: Any
    generation: Any
    dtype: torch.dtype
    attention: str
    conversions: list[Any] = field(default_factory=list)
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """The same for the same files: their names, what lies where in them, and the commit of a Hugging Face id."""
        entries = sorted(
            [name, weight.file.parent.name, weight.file.name, weight.offset, str(weight.dtype), *weight.shape]
            for name, weight in self.weights.items()
        )
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def find_stored(config: ModelConfig, dtype: torch.dtype, attention: str) -> StoredModel | str:
    """Where the weights of a model lie, or, where only `from_pretrained` can read them, why.

    Fetches what is not on this machine and reads the headers of all files. Raises ModelError when a weight is missing or has
    another shape.
    """
    from transformers import AutoConfig

    source = resolve(config.name)
    with loading_errors(config.name, "model"):
        if source.gguf_file is not None:
            return "they come from a GGUF file"
        if _find_file(source, config, "adapter_config.json") is not None:
            return "an adapter lies over them"
        settings = AutoConfig.from_pretrained(source.path, revision=config.revision or "main")
        if getattr(settings, "quantization_config", None) is not None:
            return "they are quantised"
        if getattr(settings, "transformers_weights", None) is not None:
            return "config.json names their files"
        files = _find_files(source, config)
        if files is None:
            return "they are not stored as safetensors"
        return _match(StoredModel(config, settings, _generation(source, config), dtype, attention), files)


def build_empty(stored: StoredModel) -> Any:
    """The model with its weights shared out among the ranks and not yet read; every rank must call it.

    It needs the live DeepSpeed configuration that transformers' TrainingArguments keep. Of a weight that is being shared out no
    rank writes more than its share, so on a CPU the rest never takes memory; a GPU holds one weight whole at a time.
    """
    import deepspeed
    from transformers import PreTrainedModel

    with contextlib.ExitStack() as contexts:
        # As in `from_pretrained`: DeepSpeed's zero.Init, no random numbers, nothing tied yet.
        for context in PreTrainedModel.get_init_context(stored.dtype, False, False, None):
            if isinstance(context, deepspeed.zero.Init):
                # 2026-11: that of DeepSpeed 0.19 sends each weight from the main rank to all others, and nothing is in it yet.
                context._zero_init_param = functools.partial(_share_out, context)
            contexts.enter_context(context)
        return _construct(stored)


def _share_out(init: Any, parameter: Any) -> None:
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()


def finish(model: Any, stored: StoredModel) -> Any:
    """Tie what is tied and compute what no file holds, such as rotary frequencies: the model as `load_model` returns it."""
    for value in model.state_dict(keep_vars=True).values():
        value._is_hf_initialized = True
    model.initialize_weights()
    model.tie_weights(missing_keys=set(stored.absent), recompute_mapping=False)
    model.generation_config = stored.generation
    model._weight_conversions = stored.conversions  # as `from_pretrained` leaves them, for `save_pretrained` to undo
    return ready(model.eval(), stored.config, stored.attention)


def _find_file(source: ModelSource, config: ModelConfig, name: str) -> str | None:
    from transformers.utils import cached_file

    arguments = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    found: str | None = cached_file(source.path, name, revision=config.revision or "main", **arguments)
    return found


def _find_files(source: ModelSource, config: ModelConfig) -> list[Path] | None:
    """The safetensors files of a model, fetched where they are not here; None where it has none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import get_checkpoint_shard_files

    if (single := _find_file(source, config, SAFE_WEIGHTS_NAME)) is not None:
        return [Path(single)]
    if (index := _find_file(source, config, SAFE_WEIGHTS_INDEX_NAME)) is None:
        return None
    files, _ = get_checkpoint_shard_files(source.path, index, revision=config.revision or "main")
    return [Path(file) for file in files]


def _generation(source: ModelSource, config: ModelConfig) -> Any:
    """How the model generates, as `from_pretrained` has it: where no file says so, from what config.json says of it."""
    from transformers import GenerationConfig

    arguments: dict[str, Any] = {"revision": config.revision or "main"}
    if _find_file(source, config, "generation_config.json") is None:
        arguments |= {"config_file_name": "config.json", "_from_model_config": True}
    return GenerationConfig.from_pretrained(source.path, **arguments)


def _match(stored: StoredModel, files: list[Path]) -> StoredModel | str:
    """Find each of the model's weights in the files, under the names that transformers knows it by."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    skeleton = ready(_skeleton(stored), stored.config, stored.attention)
    mapping = get_model_conversion_mapping(skeleton)
    if any(isinstance(entry, WeightConverter) for entry in mapping):
        return "transformers merges or cuts some while it reads them"
    expected = skeleton.state_dict()
    weights: dict[str, StoredWeight] = {}
    for file in files:
        for name, weight in read_header(file).items():
            renamed, _ = rename_source_key(name, mapping, [], skeleton.base_model_prefix, expected)
            if renamed in expected:
                weights[renamed] = weight
    if any(weight.dtype is None for weight in weights.values()):
        return "some are no plain floats"
    absent = expected.keys() - weights.keys()
    if (missing := _untied(absent, skeleton.all_tied_weights_keys)) and skeleton._keys_to_ignore_on_load_missing:
        return "some need not be stored"
    require_all_weights(missing, stored.config)
    _check_shapes(weights, expected)
    return replace(stored, conversions=mapping, weights=weights, absent=frozenset(absent))


def _skeleton(stored: StoredModel) -> Any:
    """The model without any memory behind its weights."""
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import set_zero3_state

    with set_zero3_state(), no_init_weights(), torch.device("meta"):  # the first: no zero.Init inside
        return _construct(stored)


def _construct(stored: StoredModel) -> Any:
    from transformers import AutoModelForCausalLM

    settings = copy.deepcopy(stored.settings)
    return AutoModelForCausalLM.from_config(settings, dtype=stored.dtype, attn_implementation=stored.attention)


def _untied(absent: set[str], ties: Mapping[str, str]) -> set[str]:
    """Those of the `absent` weights that are tied to none that is there. ties: from a weight to the one that it takes after."""

    def partners(name: str) -> set[str]:
        source = ties.get(name, name)
        return {source, *(target for target, other in ties.items() if other == source)}

    return {name for name in absent if partners(name) <= absent}


def _check_shapes(weights: Mapping[str, StoredWeight], expected: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if weight.shape != tuple(expected[name].shape):
            wanted, where = str(list(expected[name].shape)), f"{weight.file}: {name}"
            raise ModelError("a weight has another shape", where=where, expected=wanted, found=str([*weight.shape]))
