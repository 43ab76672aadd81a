"""Where the weights of a model lie, and what `from_pretrained` alone can read. The ranks are in tests/distributed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guardtrain.config import ModelConfig
from guardtrain.errors import ModelError
from guardtrain.model.split import StoredModel, find_stored


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in several files."""
    from tiny_models import build_tiny

    folder = tmp_path_factory.mktemp("saved")
    build_tiny("llama", vocab_size=100).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def find(folder: Path) -> StoredModel | str:
    return find_stored(ModelConfig(name=str(folder)), torch.float32, "sdpa")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file, {"format": "pt"})


def test_every_weight_is_found_in_its_file(saved: Path) -> None:
    stored = find(saved)
    assert isinstance(stored, StoredModel)
    held = {name: file for file in saved.glob("*.safetensors") for name in load_file(file)}
    assert len(set(held.values())) > 2
    assert {name: weight.file for name, weight in stored.weights.items()} == held
    assert stored.absent == {"lm_head.weight"}, "tied to the embedding"


def test_one_file_is_found_too(tmp_path: Path) -> None:
    from tiny_models import build_tiny

    build_tiny("qwen3", vocab_size=100, tied=False).save_pretrained(tmp_path)
    stored = find(tmp_path)
    assert isinstance(stored, StoredModel)
    assert {weight.file.name for weight in stored.weights.values()} == {"model.safetensors"}
    assert not stored.absent


def test_an_output_layer_may_be_stored_in_place_of_the_embedding(folder: Path) -> None:
    change_weights(folder, lambda held: {name.replace("model.embed_tokens", "lm_head"): value for name, value in held.items()})
    stored = find(folder)
    assert isinstance(stored, StoredModel)
    assert stored.absent == {"model.embed_tokens.weight"}


def without_embedding(folder: Path) -> None:
    change_weights(folder, lambda held: {name: value for name, value in held.items() if "embed_tokens" not in name})


def without_a_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_file(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no embedding": (without_embedding, r"incomplete, expected every weight, found 2 missing, lm_head.weight among them"),
    "a file is gone": (without_a_file, r"cannot be loaded, found .*00002-of-"),
    "a file is cut off": (cut_a_file, r"00002-of-.*ends before its last weight"),
    "another size": (
        lambda folder: change_json(folder / "config.json", intermediate_size=70),
        r"weight: a weight has another shape, expected \[32, 70\], found \[32, 64\]|expected \[70, 32\], found \[64, 32\]",
    ),
    "another depth": (
        lambda folder: change_json(folder / "config.json", num_hidden_layers=3),
        r"found 9 missing, model.layers.2.input_layernorm.weight among them",
    ),
    "broken settings": (lambda folder: (folder / "config.json").write_text("{"), r"the model cannot be loaded"),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_a_broken_folder_is_one_clear_line_before_anything_is_built(what: str, folder: Path) -> None:
    break_it, expected = BREAKAGES[what]
    break_it(folder)
    with pytest.raises(ModelError, match=expected) as caught:
        find(folder)
    assert "\n" not in str(caught.value)


def into_bin(folder: Path) -> None:
    held = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in folder.glob("*safetensors*"):
        file.unlink()
    torch.save(held, folder / "pytorch_model.bin")


LEFT_TO_TRANSFORMERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bin": (into_bin, "they are not stored as safetensors"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "an adapter lies over them"),
    "quantised": (
        lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "fp8"}),
        "they are quantised",
    ),
    "a file of another name": (
        lambda folder: change_json(folder / "config.json", transformers_weights="other.safetensors"),
        "config.json names their files",
    ),
    "integers": (
        lambda folder: change_weights(folder, lambda held: {name: value.to(torch.int8) for name, value in held.items()}),
        "some are no plain floats",
    ),
}


@pytest.mark.parametrize("what", LEFT_TO_TRANSFORMERS)
def test_what_transformers_alone_can_read_is_left_to_it(what: str, folder: Path) -> None:
    change, why = LEFT_TO_TRANSFORMERS[what]
    change(folder)
    assert find(folder) == why


def test_experts_that_transformers_merges_are_left_to_it(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 50, "num_hidden_layers": 1, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    assert find(tmp_path) == "transformers merges or cuts some while it reads them"


def test_a_gguf_file_is_left_to_transformers(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    assert find(tmp_path / "model.gguf") == "they come from a GGUF file"


def test_other_files_have_another_fingerprint(folder: Path) -> None:
    def fingerprint() -> str:
        stored = find(folder)
        assert isinstance(stored, StoredModel)
        return stored.fingerprint

    before = fingerprint()
    assert fingerprint() == before
    change_weights(folder, lambda held: {name: value.double() for name, value in held.items()})
    assert fingerprint() != before


def test_attention_that_cannot_be_replaced_is_refused_before_anything_is_built(folder: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from guardtrain.model.attention import BACKENDS

    BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"cannot be replaced by tree attention, found BloomForCausalLM"):
        find_stored(ModelConfig(name=str(folder)), torch.float32, BACKENDS["flex"].registered_name)


def test_the_random_state_is_left_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    find(saved)
    assert torch.equal(before, torch.get_rng_state())
