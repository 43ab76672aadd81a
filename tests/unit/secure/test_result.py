"""modules.json goes out and comes back; what no search wrote is refused; and a fingerprint tells models apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny

from guardtrain.config import ModelConfig
from guardtrain.errors import ConfigError, ModelError
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.result import Check, RobustModules, fingerprint, model_fingerprint
from guardtrain.secure.units import Unit

GOOD, WORSE = ProbeFigures(0.9, 0.95, 1.5, 0.95), ProbeFigures(0.88, 0.94, 1.25, 0.91)
RESULT = RobustModules(
    units={Unit(0, "q_proj"): 0.0, Unit(0, "v_proj"): 0.25, Unit(1, "gate_up_proj"): -0.01},
    robust=(Unit(1, "gate_up_proj"), Unit(0, "q_proj")),
    joint_drop=0.01,
    strength=0.5,
    tau=0.02,
    untouched=GOOD,
    checks=(Check(what="report", prompts=100, untouched=GOOD, disturbed=WORSE),),
    settings={"perturbation": "noise", "seeds": 3},
    model="smollm2-135m",
    model_hash="ab",
    data_hash="cd",
    made="2026-11-22",
)


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    RESULT.write(tmp_path / "modules.json")
    assert RobustModules.read(tmp_path / "modules.json") == RESULT
    assert [file.name for file in tmp_path.iterdir()] == ["modules.json"]
    assert RESULT.rest == (Unit(0, "v_proj"),)
    assert RESULT.checks[0].drop == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.pop("tau"), "no tau"),
        (lambda tree: tree.update(format=9), "unknown format, expected 2, found 9"),
        (lambda tree: tree["robust"].append("7.q_proj"), "robust names 7.q_proj"),
        (lambda tree: tree["robust"].append("0.q_proj"), "twice"),
        (lambda tree: tree["robust"].append("0.v_proj"), "every unit is robust"),
        (lambda tree: tree["robust"].clear(), "no unit is robust"),
        (lambda tree: tree["units"].update({"0.norm": 0.0}), "no unit: 0.norm"),
        (lambda tree: tree.update(units=[]), "not the result of a search"),
        (lambda tree: tree.update(strength=float("nan")), "not a number"),
        (lambda tree: tree["settings"].update(seeds=1), "hash differs"),
    ],
)
def test_what_no_search_wrote_is_refused_in_one_line(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    path = tmp_path / "modules.json"
    tree = json.loads(json.dumps(RESULT.to_json()))
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=said) as error:
        RobustModules.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        RobustModules.read(tmp_path / "modules.json")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny("llama", vocab_size=300).save_pretrained(folder)
    return folder


def saved(tmp_path: Path, change: Callable[[Any], object], **options: Any) -> str:
    model = build_tiny("llama", vocab_size=300)
    with torch.no_grad():
        change(model)
    model.save_pretrained(tmp_path / "other", **options)
    return fingerprint(tmp_path / "other")


def test_a_model_is_known_wherever_it_lies_and_however_it_is_cut(tiny_folder: Path, tmp_path: Path) -> None:
    assert saved(tmp_path, lambda model: None, max_shard_size="20KB") == fingerprint(tiny_folder)
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 1
    assert model_fingerprint(ModelConfig(name=str(tiny_folder))) == fingerprint(tiny_folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[1].mlp.up_proj.weight.add_(1e-6),
        lambda model: model.model.norm.weight.mul_(1.001),
        lambda model: setattr(model.config, "rope_parameters", {**model.config.rope_parameters, "rope_theta": 5.0}),
    ],
)
def test_another_model_is_another(tiny_folder: Path, tmp_path: Path, change: Callable[[Any], object]) -> None:
    assert saved(tmp_path, change) != fingerprint(tiny_folder)


def test_of_a_large_tensor_every_part_counts(tmp_path: Path) -> None:
    """As a tuned one changes: a little, everywhere."""
    model = build_tiny("llama", vocab_size=2000)  # an embedding of 250 KB: pieces of it are read
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.0001)
    model.save_pretrained(tmp_path / "tuned")
    assert fingerprint(tmp_path / "model") != fingerprint(tmp_path / "tuned")


def test_a_folder_without_a_whole_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="safetensors"):
        fingerprint(tmp_path)
    torn = (tiny_folder / "model.safetensors").read_bytes()[:-10]
    (tmp_path / "model.safetensors").write_bytes(torn)
    with pytest.raises(ModelError, match="ends before its last weight"):
        fingerprint(tmp_path)
