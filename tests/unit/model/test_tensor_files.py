"""safetensors in streams: the same files as transformers', and nothing that is not read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guardtrain import streams
from guardtrain.errors import CheckpointError, ModelError
from guardtrain.model.tensor_files import (
    INDEX,
    WEIGHTS,
    check_model,
    file_streams,
    hash_file,
    model_streams,
    plan_shards,
    write_index,
    write_shard,
)
from guardtrain.streams import TensorStream


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", 100)


@pytest.mark.parametrize("size", [10**9, 200_000, 5_000], ids=["one file", "several", "one for each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_what_transformers_writes(
    make_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", 65_538)
    model = make_tiny("llama").to(dtype)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    folder = tmp_path / "ours"
    folder.mkdir()
    # In the model's order, which is what decides on the split.
    found = {stream.name: stream for stream in model_streams(tmp_path / "whole")}
    shards = plan_shards([found[name] for name in model.state_dict() if name in found], size)
    for shard in shards:
        write_shard(folder, shard)
    write_index(folder, shards)
    check_model(folder, shards)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        assert file.read_bytes() == (tmp_path / "theirs" / file.name).read_bytes(), file.name
    assert len(list(folder.iterdir())) == len(list((tmp_path / "theirs").glob("model*")))


def test_numbers_of_all_widths_and_shapes(tmp_path: Path) -> None:
    tensors = {
        "halves": torch.randn(7, 3).half(),
        "flags": torch.tensor([True, False, True]),
        "one": torch.tensor(3.5, dtype=torch.float64),
        "counts": torch.arange(1000),
        "ünïcode": torch.randn(2, 3, 5),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    (shard,) = plan_shards(file_streams(tmp_path / "theirs.safetensors"), 10**9)
    write_shard(tmp_path, shard)
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_rounding_leaves_whole_numbers_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(50, 50), "b": torch.arange(9)}
    save_file(tensors, tmp_path / WEIGHTS)
    by_name = {stream.name: stream.to(torch.bfloat16) for stream in model_streams(tmp_path)}
    assert torch.equal(torch.cat(list(by_name["a"].chunks())), tensors["a"].bfloat16().flatten())
    assert max(len(chunk) for chunk in by_name["a"].chunks()) == 25
    assert by_name["b"].dtype == torch.int64


def test_an_empty_tensor_is_refused() -> None:
    """As ZeRO-3 leaves it when nobody gathers."""
    empty = TensorStream("model.norm.weight", (0,), torch.float32, lambda: iter(()))
    with pytest.raises(CheckpointError, match=r"model.norm.weight: a weight is empty"):
        plan_shards([empty], 100)
    with pytest.raises(CheckpointError, match="no weights to save"):
        plan_shards([], 100)


def test_a_stream_that_ends_too_soon_is_noticed(tmp_path: Path) -> None:
    short = TensorStream("a", (10,), torch.float32, lambda: iter([torch.ones(9)]))
    with pytest.raises(CheckpointError, match="not saved whole, found 4 bytes missing"):
        write_shard(tmp_path, plan_shards([short], 100)[0])


def test_a_disk_that_holds_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = TensorStream("a", (10,), torch.float32, lambda: iter([torch.ones(10)]))

    def flip(descriptor: int, *_: Any) -> None:
        with Path(f"/proc/self/fd/{descriptor}").resolve().open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")

    monkeypatch.setattr("os.posix_fadvise", flip)
    with pytest.raises(CheckpointError, match="not what was written"):
        write_shard(tmp_path, plan_shards([stream], 100)[0])


def test_a_tensor_that_the_index_has_lost_is_noticed(tmp_path: Path) -> None:
    each = [TensorStream(name, (10,), torch.float32, lambda: iter([torch.ones(10)])) for name in "abc"]
    shards = plan_shards(each, 40)
    for shard in shards:
        write_shard(tmp_path, shard)
    write_index(tmp_path, shards)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["b"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="b: a weight was not saved"):
        check_model(tmp_path, shards)


@pytest.mark.parametrize("content", [b"", b"garbage!garbage", (10**15).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"])
def test_a_file_that_is_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        model_streams(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"no such file.*weights as safetensors"):
        model_streams(tmp_path)


def test_a_file_that_was_cut_off_is_noticed_on_reading(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / WEIGHTS)
    size = hash_file(tmp_path / WEIGHTS).num_bytes
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate(size - 10)
    (stream,) = model_streams(tmp_path)
    with pytest.raises(OSError, match="ends too soon"):
        list(stream.chunks())
