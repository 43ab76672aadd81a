"""Where numbers lie in a file that torch.save wrote. What DeepSpeed writes: tests/distributed/test_exports_of_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guardtrain.distributed.shards import _File


def test_tensors_are_found_where_they_lie(tmp_path: Path) -> None:
    """Also parts of a larger one, and two that share their numbers."""
    vector = torch.arange(100.0)
    saved = {
        "vector": vector,
        "part": vector[30:50].view(4, 5),
        "half": torch.ones(3).half(),
        "again": vector,
        "empty": vector[:0],
    }
    torch.save(saved, tmp_path / "saved.pt")
    file = _File.described(tmp_path / "saved.pt")
    for name, tensor in saved.items():
        chunks = list(file.stored(file.tree[name]).chunks())
        assert torch.equal(torch.cat([torch.empty(0, dtype=tensor.dtype), *chunks]), tensor.flatten()), name


def test_a_tensor_in_another_order_is_refused(tmp_path: Path) -> None:
    torch.save({"turned": torch.ones(2, 3).T}, tmp_path / "saved.pt")
    file = _File.described(tmp_path / "saved.pt")
    with pytest.raises(ValueError, match="one after the other"):
        file.stored(file.tree["turned"])
