"""Models as safetensors files, read and written a few megabytes at a time, with hashes of what was written.

The files are those that transformers writes: the same split, names, index and layout (huggingface.co/docs/safetensors: eight
bytes with the length of a JSON header, the header, the numbers; wide number formats first, then by name).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from guardtrain.errors import CheckpointError, ModelError
from guardtrain.streams import Stored, TensorStream, bytes_of, stored_stream

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5 * 10**9
FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FORMAT_NAMES = {dtype: name for name, dtype in FORMATS.items()}


@dataclass(frozen=True)
class Shard:
    """One file of a model: its name, and its tensors in the order in which they lie in it.

    header: what stands before the numbers, of a file that is no safetensors; its streams are then its bytes, padding included.
    """

    name: str
    streams: tuple[TensorStream, ...]
    header: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return sum(stream.num_bytes for stream in self.streams)


@dataclass(frozen=True)
class Written:
    """A file that is on disk: its size and BLAKE2b hash."""

    num_bytes: int
    digest: str


def plan_shards(streams: Iterable[TensorStream], most_bytes: int) -> list[Shard]:
    """Share tensors out among files of at most `most_bytes`; a larger tensor gets one of its own. Raises CheckpointError.

    As transformers does: in their order, the next file where one does not fit. What ZeRO-3 has split looks like a tensor without
    numbers, and others have saved it so: such a one is refused.
    """
    groups: list[list[TensorStream]] = []
    group: list[TensorStream] = []
    room = most_bytes
    for stream in streams:
        if 0 in stream.shape:
            raise CheckpointError("a weight is empty", where=stream.name, found=f"shape {list(stream.shape)}")
        if stream.num_bytes > most_bytes:
            groups.append([stream])
            continue
        if stream.num_bytes > room:
            groups.append(group)
            group, room = [], most_bytes
        group.append(stream)
        room -= stream.num_bytes
    groups += [group] if group else []
    if not groups:
        raise CheckpointError("the model has no weights to save")
    names = [WEIGHTS] if len(groups) == 1 else [f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors" for n in range(len(groups))]
    return [Shard(name, tuple(sorted(group, key=_place))) for name, group in zip(names, groups, strict=True)]


def _place(stream: TensorStream) -> tuple[int, str]:
    return -stream.dtype.itemsize, stream.name


class TensorFile:
    """A file that is being written: header first, a safetensors' if none is given, then numbers in the order of `streams`."""

    def __init__(self, path: Path, streams: Sequence[TensorStream], header: bytes | None = None) -> None:
        self._path, self._hash = path, hash_of_files()
        self._left = sum(stream.num_bytes for stream in streams)
        self._file = path.open("wb", buffering=0)
        self._write(_header(streams) if header is None else header)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, chunk: torch.Tensor) -> None:
        """The next numbers."""
        data = bytes_of(chunk.cpu())
        self._left -= len(data)
        self._write(data)

    def finish(self) -> Written:
        """On disk when it returns, and read back from there. Raises CheckpointError when it is not what was written."""
        if self._left:
            raise CheckpointError("a weight was not saved whole", where=str(self._path), found=f"{self._left} bytes missing")
        os.fsync(self._file.fileno())
        written = Written(self._file.tell(), self._hash.hexdigest())
        if hasattr(os, "posix_fadvise"):  # not on macOS; else it would be read from the cache, which is not what the disk holds
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        check_file(self._path, written)
        return written

    def _write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]


def check_file(path: Path, written: Written) -> None:
    """Raise CheckpointError unless the file is as it was written."""
    if hash_file(path) != written:
        raise CheckpointError("the file is not what was written into it: its hash differs", where=str(path))


def write_shard(folder: Path, shard: Shard, streams: Iterable[TensorStream] | None = None) -> Written:
    """Write one file of a model and read it back. Raises CheckpointError, OSError.

    streams: the shard's, as an iterator that tells the caller how far it came.
    """
    with TensorFile(folder / shard.name, shard.streams, shard.header) as file:
        for stream in shard.streams if streams is None else streams:
            for chunk in stream.chunks():
                file.add(chunk)
        return file.finish()


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write which file holds which tensor; of a model in one file nothing is to be written."""
    if len(shards) > 1:
        streams = [stream for shard in shards for stream in shard.streams]
        metadata = {
            "total_parameters": sum(stream.num_bytes // stream.dtype.itemsize for stream in streams),
            "total_size": sum(shard.num_bytes for shard in shards),
        }
        index = {"metadata": metadata, "weight_map": {stream.name: shard.name for shard in shards for stream in shard.streams}}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_model(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise CheckpointError unless `folder`, read as its users will, holds every tensor in its shape and format, and no other."""
    expected = {stream.name: (stream.shape, stream.dtype) for shard in shards for stream in shard.streams}
    streams = file_streams(folder / shards[0].name) if len(shards) == 1 else model_streams(folder)
    found = {stream.name: (stream.shape, stream.dtype) for stream in streams}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            where = f"{folder}: {name}"
            raise CheckpointError(
                "a weight was not saved", where=where, expected=str(expected.get(name)), found=str(found.get(name))
            )


def model_streams(folder: Path) -> list[TensorStream]:
    """The tensors of a model folder with one safetensors file or an index of several. Raises ModelError."""
    if not (folder / INDEX).is_file():
        return file_streams(folder / WEIGHTS)
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        by_file = {name: {stream.name: stream for stream in file_streams(folder / name)} for name in sorted(set(files.values()))}
        return [by_file[file][name] for name, file in files.items()]
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise ModelError("the model's index cannot be used", where=str(folder / INDEX), found=str(error)) from error


def file_streams(path: Path) -> list[TensorStream]:
    """The tensors of one safetensors file, in their order in it. Raises ModelError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return [_stream(path, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"]
    except FileNotFoundError as error:
        raise ModelError("the model has no such file", where=str(path), expected="weights as safetensors") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ModelError("not a safetensors file", where=str(path), found=str(error)) from error


def _stream(path: Path, start: int, name: str, entry: dict[str, Any]) -> TensorStream:
    dtype, (first, last) = FORMATS[entry["dtype"]], entry["data_offsets"]
    return stored_stream(name, entry["shape"], [Stored(path, start + first, (last - first) // dtype.itemsize, dtype)])


def _header(streams: Sequence[TensorStream]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for stream in streams:
        end = offset + stream.num_bytes
        header[stream.name] = {
            "dtype": FORMAT_NAMES[stream.dtype],
            "shape": list(stream.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def hash_file(path: Path) -> Written:
    """Size and hash of a file as it is now."""
    with path.open("rb") as file:
        return Written(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, hash_of_files).hexdigest())


def hash_of_files() -> Any:
    """The hash that checkpoints use too."""
    return hashlib.blake2b(digest_size=20)
