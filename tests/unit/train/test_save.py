"""A main rank that cannot write goes on gathering, for the others wait for it in collectives."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from guardtrain.errors import CheckpointError
from guardtrain.model.tensor_files import TensorFile, plan_shards
from guardtrain.streams import TensorStream
from guardtrain.train.save import _gather_into


@pytest.mark.parametrize("fails_at", [0, 2])
def test_all_tensors_are_gathered_whatever_the_disk_does(fails_at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gathered: list[str] = []

    def chunks(name: str) -> Iterator[torch.Tensor]:
        gathered.append(name)
        yield torch.ones(10)

    def full(self: TensorFile, chunk: torch.Tensor) -> None:
        if len(gathered) > fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "add", full)
    (shard,) = plan_shards([TensorStream(name, (10,), torch.float32, partial(chunks, name)) for name in "abcd"], 1000)
    with pytest.raises(CheckpointError, match=r"could not be written, found .*No space left on device .*intact; make room"):
        _gather_into(shard, tmp_path)
    assert gathered == list("abcd")
