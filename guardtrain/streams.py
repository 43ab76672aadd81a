"""Tensors on their way from one file to another, a few megabytes at a time: how a model moves that no machine's memory holds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class TensorStream:
    """A tensor that is read piece by piece. `chunks()` gives its numbers in order, as flat tensors of `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterator[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype | None) -> TensorStream:
        """The same numbers rounded to `dtype`; None, and whole numbers, leave them as they are."""
        if dtype in (None, self.dtype) or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, chunks=lambda: (chunk.to(dtype) for chunk in self.chunks()))


@dataclass(frozen=True)
class Stored:
    """`count` numbers that lie one after the other in a file, from byte `offset` on."""

    path: Path
    offset: int
    count: int
    dtype: torch.dtype

    def part(self, start: int, stop: int) -> Stored:
        """Numbers `start` to `stop` of these."""
        return replace(self, offset=self.offset + start * self.dtype.itemsize, count=stop - start)

    def chunks(self) -> Iterator[torch.Tensor]:
        """The numbers, read and not mapped: mapped pages would count as memory until the mapping is let go."""
        most, left = CHUNK_BYTES // self.dtype.itemsize, self.count
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                chunk = torch.empty(min(left, most), dtype=self.dtype)
                _read_into(file.fileno(), chunk, self.path)
                yield chunk
                left -= len(chunk)


def stored_stream(name: str, shape: Sequence[int], pieces: Sequence[Stored]) -> TensorStream:
    """The tensor whose numbers lie in `pieces`, one after the other; pieces without numbers do no harm."""
    return TensorStream(name, tuple(shape), pieces[0].dtype, lambda: (chunk for piece in pieces for chunk in piece.chunks()))


def pieces_of(parts: Sequence[Stored], start: int, stop: int) -> list[Stored]:
    """Numbers `start` to `stop` of what `parts` hold when laid end to end."""
    found, before = [], 0
    for part in parts:
        first, last = max(start - before, 0), min(stop - before, part.count)
        if first < last:
            found.append(part.part(first, last))
        before += part.count
    return found


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the host, in its own format and without a copy of those that lie one after the other."""
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _read_into(descriptor: int, chunk: torch.Tensor, path: Path) -> None:
    wanted, done = bytes_of(chunk), 0
    while done < len(wanted):
        count = os.readv(descriptor, [wanted[done:]])
        if not count:
            raise OSError(None, "it ends too soon", str(path))
        done += count
