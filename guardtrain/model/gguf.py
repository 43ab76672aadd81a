"""Models as GGUF files, which llama.cpp and Ollama run: header by the package `gguf`, weights converted a few rows at a time.

The layout (github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header with settings, tokenizer and the place of every tensor,
padded to 32 bytes; then the tensors, each padded so. Matrices take the wanted format; vectors, which are small and which norms
are sensitive to, stay float32.

Shape suffix: R rows, C columns.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guardtrain.errors import ModelError
from guardtrain.model.gguf_tokenizer import add_tokenizer
from guardtrain.model.load import EXPORTED_GGUF
from guardtrain.model.tensor_files import Shard
from guardtrain.streams import CHUNK_BYTES, TensorStream

ALIGNMENT = 32
BLOCK = 32  # numbers of q8_0 that share a scale
# The architectures that were held against transformers and llama.cpp; each has RMS norms, SwiGLU and rotary positions.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
INTERLEAVED = {"llama"}  # whose rotary pairs lie next to each other in GGUF: rows of q and k change places
FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ROPE_FACTORS = "rope_freqs.weight"

Value = str | float | Sequence[str]


@dataclass(frozen=True)
class Entry:
    """A tensor on its way into the file: its name and shape there, its format in gguf's terms, and its bytes, padded."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    num_bytes: int
    stream: TensorStream


def gguf_shard(
    streams: Sequence[TensorStream], texts: Mapping[str, bytes], dtype: str, *, name: str, metadata: Mapping[str, Value]
) -> Shard:
    """The one file of a model. Raises ModelError for an architecture or tokenizer that has no counterpart there.

    texts: config.json and the files of the tokenizer. dtype: one of FORMATS. name: what the file calls the model.
    metadata: further settings in its header, by key.
    """
    config = _config_of(texts)
    entries = _entries(config, streams, dtype)
    header = _header(config, texts, entries, {"general.name": name, **metadata}, dtype)
    return Shard(EXPORTED_GGUF, tuple(entry.stream for entry in entries), header)


def format_of(dtype: torch.dtype) -> str:
    """The format that keeps the numbers of a model as they are. Raises ModelError."""
    name = str(dtype).removeprefix("torch.")
    if name not in FORMATS:
        raise ModelError("GGUF has no such number format", expected=f"--dtype {', '.join(FORMATS)}", found=name)
    return name


def check_gguf(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise ModelError unless the one file, read as its users will, holds the tensors that were meant for it."""
    from gguf import GGUFReader

    (shard,) = shards
    path = folder / shard.name
    try:
        reader = GGUFReader(path)
        found = {tensor.name: -(-tensor.n_bytes // ALIGNMENT) * ALIGNMENT for tensor in reader.tensors}
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError("not a GGUF file", where=str(path), found=str(error)) from error
    expected = {stream.name: stream.num_bytes for stream in shard.streams}
    if found != expected:
        raise ModelError("a weight was not saved", where=str(path), expected=f"{len(expected)} tensors", found=str(len(found)))


def _config_of(texts: Mapping[str, bytes]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(texts["config.json"])
    kind = config.get("model_type")
    odd = {
        "model_type": None if kind in ARCHITECTURES else kind,
        "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
        "use_sliding_window": config.get("use_sliding_window") or None,
        "rope_type": None if _rope(config)["rope_type"] in ("default", "llama3") else _rope(config)["rope_type"],
    }
    for key, found in odd.items():
        if found is not None:
            expected = f"an architecture of {', '.join(ARCHITECTURES)}, without extras"
            raise ModelError(
                "this model cannot be written as GGUF", where=f"config.json: {key}", expected=expected, found=str(found)
            )
    return config


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotary positions, in the spelling of transformers 5."""
    told = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = told.get("rope_type") or told.get("type") or "default"
    return {"rope_theta": config.get("rope_theta", 10000.0), **told, "rope_type": kind}


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _entries(config: Mapping[str, Any], streams: Sequence[TensorStream], dtype: str) -> list[Entry]:
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config["model_type"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    entries = []
    for stream in streams:
        if stream.name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # the embedding is the output layer too, and readers know it by this tensor's absence
        name = names.get_name(stream.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(
                "a weight has no place in a GGUF file", where=stream.name, expected=f"a plain {config['model_type']}"
            )
        heads = _rotated_heads(config, stream.name)
        entries.append(_entry(name, stream, dtype, _head_dim(config) if heads else None))
    return [*entries, *_rope_factors(config)]


def _rotated_heads(config: Mapping[str, Any], name: str) -> bool:
    return config["model_type"] in INTERLEAVED and any(part in name for part in (".q_proj.", ".k_proj."))


def _entry(name: str, stream: TensorStream, dtype: str, head_dim: int | None) -> Entry:
    """head_dim: rows of a head, where they change places."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(stream.shape) == 1:
        dtype = "float32"
    elif dtype == "q8_0" and stream.shape[-1] % BLOCK:
        dtype = "float16"
    kind = GGMLQuantizationType[FORMATS[dtype]]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    num_bytes = math.prod(stream.shape) // block * block_bytes
    padded = -(-num_bytes // ALIGNMENT) * ALIGNMENT
    chunks = _converter(stream, kind, head_dim, padded - num_bytes)
    return Entry(name, stream.shape, kind, num_bytes, TensorStream(name, (padded,), torch.uint8, chunks))


def _converter(stream: TensorStream, kind: Any, head_dim: int | None, padding: int) -> Callable[[], Iterator[torch.Tensor]]:
    from gguf import quants

    unit = head_dim or 1
    num_columns = stream.shape[-1] if len(stream.shape) > 1 else 1

    def chunks() -> Iterator[torch.Tensor]:
        for rows_RC in _row_blocks(stream, max(CHUNK_BYTES // 4 // num_columns // unit, 1) * unit, num_columns):
            ordered_RC = _interleaved(rows_RC, head_dim) if head_dim else rows_RC
            flat = ordered_RC if len(stream.shape) > 1 else ordered_RC.flatten()
            converted = quants.quantize(flat.contiguous().numpy(), kind)
            yield torch.from_numpy(converted.reshape(-1).view("uint8"))
        if padding:
            yield torch.zeros(padding, dtype=torch.uint8)

    return chunks


def _row_blocks(stream: TensorStream, num_rows: int, num_columns: int) -> Iterator[torch.Tensor]:
    """The tensor in float32, `num_rows` rows at a time; the last block may have fewer."""
    size, held = num_rows * num_columns, torch.empty(0)
    for chunk in stream.chunks():
        held = torch.cat([held, chunk.float()])
        while len(held) >= size:
            yield held[:size].view(num_rows, num_columns)
            held = held[size:]
    if len(held):
        yield held.view(-1, num_columns)


def _interleaved(rows_RC: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads as llama.cpp wants them: transformers turns row i with row i + head_dim / 2, it with row i + 1."""
    halves = rows_RC.view(-1, 2, head_dim // 2, rows_RC.shape[-1])
    return halves.transpose(1, 2).reshape(rows_RC.shape)


def _rope_factors(config: Mapping[str, Any]) -> list[Entry]:
    """By what llama.cpp divides each rotary frequency, for Llama 3.1 and later, whose long waves are stretched.

    Source: transformers' `_compute_llama3_parameters`, of which this is the ratio.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return []
    half = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    waves = 2 * math.pi * rope["rope_theta"] ** half
    longest = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    shortest = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / waves - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = torch.where(waves < shortest, torch.ones(()), torch.where(waves > longest, torch.tensor(rope["factor"]), between))
    stream = TensorStream(ROPE_FACTORS, tuple(factors.shape), torch.float32, lambda: iter([factors.float()]))
    return [_entry(ROPE_FACTORS, stream, "float32", None)]


def _header(
    config: Mapping[str, Any], texts: Mapping[str, bytes], entries: Sequence[Entry], metadata: Mapping[str, Value], dtype: str
) -> bytes:
    """All bytes before the first tensor."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_bytes(text)
        path = Path(folder) / EXPORTED_GGUF
        writer = gguf.GGUFWriter(path, config["model_type"])
        _add_geometry(writer, config, dtype)
        add_tokenizer(writer, Path(folder), config["vocab_size"])
        for key, value in metadata.items():
            add = {str: writer.add_string, float: writer.add_float64}.get(type(value), writer.add_array)
            add(key, value)
        for entry in entries:
            writer.add_tensor_info(entry.name, entry.shape, torch.empty(0).numpy().dtype, entry.num_bytes, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + b"\0" * (-len(header) % ALIGNMENT)


def _add_geometry(writer: Any, config: Mapping[str, Any], dtype: str) -> None:
    from gguf import LlamaFileType

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(LlamaFileType[FILE_TYPES[dtype]])
    if dtype == "q8_0":
        writer.add_quantization_version(2)  # of the layout of blocks, the only one since 2023
