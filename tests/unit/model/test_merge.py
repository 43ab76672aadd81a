"""Adapters merged in a stream equal peft's merge_and_unload."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guardtrain import streams
from guardtrain.errors import ModelError
from guardtrain.model.merge import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_folder, merge_adapter
from guardtrain.model.tensor_files import model_streams

MakeTiny = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no whole number of rows, and of less than one."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", 4 * 101)


def save(model: Any, folder: Path, **settings: Any) -> Any:
    """Save a base model and an adapter that changes it; returns the adapted model."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(folder / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules="all-linear", **settings)
    adapted = get_peft_model(model, lora)
    torch.manual_seed(1)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value)
    adapted.save_pretrained(folder / "adapter")
    return adapted


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_it_equals_merge_and_unload(make_tiny: MakeTiny, kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """To float32's rounding, of numbers up to sixty: products of rank 4 are summed in another order."""
    adapted = save(make_tiny(kind), tmp_path, **settings)
    base = load_file(tmp_path / "base" / "model.safetensors")
    expected = adapted.merge_and_unload().state_dict()
    merged = merge_adapter(model_streams(tmp_path / "base"), tmp_path / "adapter")
    changed = 0
    for stream in merged:
        found = torch.cat(list(stream.chunks())).view(stream.shape)
        assert torch.allclose(found, expected[stream.name], rtol=1e-5, atol=1e-5), stream.name
        changed += not torch.equal(found, base[stream.name])
    assert len(merged) == len(base)
    assert changed == 2 * 7, "the matrices of two layers"


def test_halves_are_summed_in_float32_and_rounded_once(make_tiny: MakeTiny, tmp_path: Path) -> None:
    adapted = save(make_tiny("llama").bfloat16(), tmp_path)
    exact = adapted.float().merge_and_unload().state_dict()
    for stream in merge_adapter(model_streams(tmp_path / "base"), tmp_path / "adapter"):
        found = torch.cat(list(stream.chunks())).view(stream.shape)
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.float(), exact[stream.name], rtol=2**-8, atol=1e-6), stream.name


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("fan_in_fan_out", True), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 2}),
     ("init_lora_weights", "pissa"), ("bias", "all"), ("peft_type", "LOHA"), ("r", 0), ("use_mora", True)],
)  # fmt: skip
def test_what_a_stream_would_get_wrong_is_refused(make_tiny: MakeTiny, key: str, value: Any, tmp_path: Path) -> None:
    save(make_tiny("llama"), tmp_path)
    path = tmp_path / "adapter" / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ModelError, match=f"{key}.*cannot be merged in a stream"):
        merge_adapter(model_streams(tmp_path / "base"), tmp_path / "adapter")


def test_another_base_model_is_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    save(make_tiny("llama"), tmp_path)
    make_tiny("llama", hidden_size=64).save_pretrained(tmp_path / "wider")
    with pytest.raises(ModelError, match="does not fit its base model"):
        merge_adapter(model_streams(tmp_path / "wider"), tmp_path / "adapter")
    make_tiny("llama", num_layers=1).save_pretrained(tmp_path / "shorter")
    with pytest.raises(ModelError, match=r"does not fit.*model.layers.1.*found None"):
        merge_adapter(model_streams(tmp_path / "shorter"), tmp_path / "adapter")


def test_half_a_pair_and_other_tensors_are_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    save(make_tiny("llama"), tmp_path)
    file = tmp_path / "adapter" / ADAPTER_WEIGHTS
    whole = load_file(file)
    lost = next(name for name in whole if "lora_B" in name)
    for saved, message in (
        ({name: value for name, value in whole.items() if name != lost}, "half of a pair"),
        ({**whole, "base_model.model.lm_head.weight": torch.ones(2, 2)}, "not made of pairs"),
        ({**whole, lost: torch.ones(4, 0)}, "not made of pairs"),
    ):
        save_file(saved, file)
        with pytest.raises(ModelError, match=message):
            merge_adapter(model_streams(tmp_path / "base"), tmp_path / "adapter")


def test_base_models_without_plain_weights_are_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF"):
        base_folder(str(tmp_path / "some.gguf"), None)
    make_tiny("llama").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(ModelError, match="quantised base"):
        base_folder(str(tmp_path / "base"), None)
