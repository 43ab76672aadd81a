"""What each kind of export consists of: a whole model, an adapter, a GGUF file, and what Ollama and vLLM are started with."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from guardtrain.data.template import GuardTemplate
from guardtrain.distributed.shards import engine_streams
from guardtrain.errors import ConfigError
from guardtrain.inference.guards import GuardSettings
from guardtrain.model.export import Plan
from guardtrain.model.gguf import check_gguf, format_of, gguf_shard
from guardtrain.model.load import load_tokenizer
from guardtrain.model.merge import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_folder, merge_adapter
from guardtrain.model.tensor_files import file_streams, model_streams, plan_shards
from guardtrain.streams import TensorStream
from guardtrain.train import launchers
from guardtrain.train.export_source import Source, base_of, config_naming_format, digest, fingerprint_of, texts_beside

CONFIGS = ("config.json", "generation_config.json")
# As `load_guard` does, so this is what was measured; 4-bit weights rounded back to 16 bits would keep their error for nothing.
MERGED_4_BIT = "the adapter goes into the base model's own weights, not into the 4-bit ones that it was trained on"
SAFETENSORS_FORMATS = ("float32", "bfloat16", "float16")
GGUF_FORMATS = (*SAFETENSORS_FORMATS, "q8_0")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """to: one of KINDS. shard_bytes: of one file of weights at most.

    checkpoint: its name; None: the finished model, else the newest valid checkpoint. out: the new folder; None: one in the run's.
    dtype: as torch calls it, or q8_0 for GGUF; None leaves number formats as they are.
    """

    to: str
    shard_bytes: int
    checkpoint: str | None = None
    out: Path | None = None
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, how many tensors and numbers the model in it has, and what is to be said of it."""

    plan: Plan
    num_tensors: int
    num_parameters: int
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """A whole model: its tensors, as they are saved, the text files that belong to it, and what it is made of."""

    streams: list[TensorStream]
    texts: dict[str, bytes]
    fingerprint: list[Any]
    notes: list[str]

    def planned(self, plan: Plan) -> Planned:
        """With figures of this model."""
        parameters = sum(math.prod(stream.shape) for stream in self.streams)
        return Planned(plan=plan, num_tensors=len(self.streams), num_parameters=parameters, notes=self.notes)


def plan_merged(source: Source, options: ExportOptions) -> Planned:
    """A whole model as safetensors."""
    whole = _whole(source, options.dtype)
    fingerprint = ["merged", options.shard_bytes, str(options.dtype), *whole.fingerprint]
    return whole.planned(Plan(plan_shards(whole.streams, options.shard_bytes), whole.texts, digest(fingerprint)))


def plan_adapter(source: Source, options: ExportOptions) -> Planned:
    """The adapter alone. Raises ConfigError where there is none."""
    if not source.is_adapter:
        found = f"model.method={source.recipe.model.method}"
        raise ConfigError("the run trained no adapter", where="--to adapter", expected="lora or qlora", found=found)
    if options.dtype is not None:
        raise ConfigError("an adapter is copied as it is", where="--dtype", expected="--to merged")
    streams = file_streams(source.folder / ADAPTER_WEIGHTS)
    (shard,) = plan_shards(streams, sys.maxsize)
    texts = {**texts_beside(source), ADAPTER_CONFIG: (source.folder / ADAPTER_CONFIG).read_bytes()}
    whole = _Whole(streams=streams, texts=texts, fingerprint=[fingerprint_of(source.folder), "adapter"], notes=[])
    return whole.planned(Plan([replace(shard, name=ADAPTER_WEIGHTS)], texts, digest(whole.fingerprint)))


def plan_gguf(source: Source, options: ExportOptions) -> Planned:
    """One GGUF file, and for a guard how to run it with llama.cpp."""
    more = launchers.for_llama_cpp(_template(source), _settings(source)) if source.is_guard else {}
    return _plan_gguf(source, options, more)


def plan_ollama(source: Source, options: ExportOptions) -> Planned:
    """The same with Modelfiles. Raises ConfigError where the run trained no guard."""
    _require_guard(source, options)
    return _plan_gguf(source, options, launchers.for_ollama(_template(source), _settings(source)))


def plan_vllm(source: Source, options: ExportOptions) -> Planned:
    """A whole model as safetensors, and what starts vLLM with it. Raises ConfigError where the run trained no guard."""
    _require_guard(source, options)
    planned = plan_merged(source, options)
    config = json.loads(planned.plan.texts["config.json"])
    texts = planned.plan.texts | launchers.for_vllm(_template(source), _settings(source), config["max_position_embeddings"])
    fingerprint = digest(["vllm", planned.plan.fingerprint])
    return replace(planned, plan=replace(planned.plan, texts=texts, fingerprint=fingerprint))


Planner = Callable[[Source, ExportOptions], Planned]
KINDS: dict[str, tuple[Planner, Sequence[str]]] = {
    "merged": (plan_merged, SAFETENSORS_FORMATS),
    "adapter": (plan_adapter, ()),
    "gguf": (plan_gguf, GGUF_FORMATS),
    "ollama": (plan_ollama, GGUF_FORMATS),
    "vllm": (plan_vllm, SAFETENSORS_FORMATS),
}


def _whole(source: Source, dtype_name: str | None) -> _Whole:
    notes: list[str] = []
    dtype = getattr(torch, dtype_name) if dtype_name else None
    fingerprint: list[Any] = [fingerprint_of(source.folder)]
    texts = texts_beside(source)
    if source.is_adapter:
        base = base_folder(*base_of(source))
        streams = merge_adapter(model_streams(base), source.folder)
        fingerprint.append(fingerprint_of(base))
        texts |= {name: (base / name).read_bytes() for name in CONFIGS if (base / name).is_file()}
        notes += [MERGED_4_BIT] if source.recipe.model.method == "qlora" else []
    else:
        streams = engine_streams(source.folder, dtype) if (source.folder / "latest").is_file() else model_streams(source.folder)
    streams = [stream.to(dtype) for stream in streams]
    texts["config.json"] = config_naming_format(source, texts, streams)
    return _Whole(streams=streams, texts=texts, fingerprint=fingerprint, notes=notes)


def _plan_gguf(source: Source, options: ExportOptions, more: Mapping[str, bytes]) -> Planned:
    whole = _whole(source, None)
    dtype = options.dtype or format_of(max(whole.streams, key=lambda stream: stream.num_bytes).dtype)
    metadata = _metadata(_settings(source)) if source.is_guard else {}
    shard = gguf_shard(whole.streams, whole.texts, dtype, name=f"guardtrain {source.recipe.name}", metadata=metadata)
    fingerprint = digest([options.to, dtype, *whole.fingerprint])
    return whole.planned(Plan([shard], {**whole.texts, **more}, fingerprint, check_gguf))


def _metadata(settings: GuardSettings) -> dict[str, str | float | Sequence[str]]:
    """What a GGUF file says of its guard. guardtrain reads guard.json beside it, which a later calibration changes."""
    found: dict[str, str | float | Sequence[str]] = {
        "guardtrain.policy": settings.policy,
        "guardtrain.policy_sha256": hashlib.sha256(settings.policy.encode()).hexdigest(),
        "guardtrain.modes": list(settings.modes),
    }
    if settings.calibration is not None:
        found["guardtrain.calibration_date"] = settings.calibration.date
        for mode, each in settings.calibration.modes.items():
            found[f"guardtrain.threshold.{mode}"] = each.threshold
            found[f"guardtrain.temperature.{mode}"] = each.temperature
            found[f"guardtrain.bias.{mode}"] = each.bias
    return found


def _require_guard(source: Source, options: ExportOptions) -> None:
    if not source.is_guard:
        expected, hint = "a run of task guard", "--to merged or --to gguf"
        raise ConfigError("it is started as a guard", where=f"--to {options.to}", expected=expected, found="instruct", hint=hint)


def _settings(source: Source) -> GuardSettings:
    texts_beside(source)  # raises in its own words where guard.json is missing
    return GuardSettings.read(source.folder)


def _template(source: Source) -> GuardTemplate:
    return GuardTemplate(load_tokenizer(str(source.folder)), _settings(source).policy)
