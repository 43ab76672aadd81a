"""Parts of weights, read from safetensors files without the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from guardtrain.errors import ModelError
from guardtrain.model import stored
from guardtrain.model.stored import read_header

WEIGHTS = {
    "matrix": torch.randn(7, 5),
    "half": torch.randn(4, 3, 2).to(torch.bfloat16),
    "double": torch.randn(9, dtype=torch.float64),
    "number": torch.randn(()).half(),
    "empty": torch.zeros(0, 3),
    "whole": torch.arange(3),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "model.safetensors"
    save_file(WEIGHTS, path, {"format": "pt"})
    return path


def test_a_header_says_what_is_where(file: Path) -> None:
    found = read_header(file)
    assert {name: (weight.shape, weight.dtype) for name, weight in found.items()} == {
        name: (tuple(value.shape), None if name == "whole" else value.dtype) for name, value in WEIGHTS.items()
    }


@given(st.sampled_from(sorted(WEIGHTS.keys() - {"whole"})), st.data(), st.sampled_from([8, 24, 1 << 24]))
def test_any_part_is_read_in_any_format(file: Path, name: str, data: st.DataObject, chunk_bytes: int) -> None:
    flat = WEIGHTS[name].reshape(-1)
    start = data.draw(st.integers(0, flat.numel()))
    count = data.draw(st.integers(0, flat.numel() - start))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    target = torch.full((count,), float("nan"), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "CHUNK_BYTES", chunk_bytes)
        read_header(file)[name].read_into(target, start)
    assert torch.equal(target, flat[start : start + count].to(dtype))


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_torn_file_is_refused(kept: int, file: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"torn.safetensors: the file ends before its last weight"):
        read_header(torn)


def test_a_file_that_is_cut_off_later_is_refused_too(file: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes())
    weight = max(read_header(torn).values(), key=lambda weight: weight.offset)
    torn.write_bytes(file.read_bytes()[: weight.offset])
    with pytest.raises(ModelError, match=r"torn.safetensors: the file ends before its last weight"):
        weight.read_into(torch.empty(1), 0)


def test_a_file_without_weights_has_none(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (tmp_path / "none.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_header(tmp_path / "none.safetensors") == {}
