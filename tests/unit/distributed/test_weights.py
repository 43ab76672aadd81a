"""What was saved is read back: an adapter without numbers in it must not pass for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guardtrain.distributed.weights import verify, weights_to_save, write_model
from guardtrain.errors import CheckpointError


@pytest.fixture
def adapter(make_tiny: Callable[..., Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(make_tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(make_tiny: Callable[..., Any], tied: bool, tmp_path: Path) -> None:
    model = make_tiny("llama", tied=tied)
    assert weights_to_save(model, zero_stage=2) is None
    write_model(model, tmp_path, None)
    expected = model.state_dict()
    missing = dict(load_file(tmp_path / "model.safetensors"))
    del missing["model.norm.weight"]
    save_file(missing, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight: a weight was not saved, expected \[32\], found None"):
        verify(tmp_path, expected, compare_values=False)


def test_an_adapter_is_compared_number_by_number(adapter: Any, tmp_path: Path) -> None:
    write_model(adapter, tmp_path, None)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    name = next(name for name in saved if "lora_A" in name)
    saved[name][0, 0] += 1
    save_file(saved, file)
    from peft import get_peft_model_state_dict

    with pytest.raises(CheckpointError, match=f"{name}: a weight was saved with other values"):
        verify(tmp_path, get_peft_model_state_dict(adapter), compare_values=True)


def test_an_empty_adapter_is_refused(adapter: Any, tmp_path: Path) -> None:
    """As ZeRO-3 leaves it when nobody gathers: every tensor has no elements."""
    empty = {name: torch.empty(0) for name, value in adapter.state_dict().items() if "lora_" in name}
    with pytest.raises(CheckpointError, match="a weight was not saved"):
        write_model(adapter, tmp_path, empty)


def test_nothing_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights to save"):
        verify(tmp_path, {}, compare_values=True)
