"""Measures a device for the planner: what products, memory, operators and collectives reach while all ranks are at work."""

from __future__ import annotations

import dataclasses
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from guardtrain.plan.hardware import Device
from guardtrain.plan.setup import Compute
from guardtrain.plan.step_time import ATTENTION_PRODUCTS, LINK_EFFICIENCY, OPERATORS
from guardtrain.train.memory import keep_freed_memory

# Products as in models of 0.1 to 1 billion parameters: (tokens, inputs, outputs). Large GPUs are measured on larger ones.
CPU_SHAPES = ((512, 576, 1536), (512, 1024, 3072), (512, 1536, 576))
GPU_SHAPES = ((4096, 4096, 14336), (4096, 4096, 4096), (4096, 14336, 4096))
CPU_ELEMENTS, GPU_ELEMENTS = 2**24, 2**27
REDUCED_ELEMENTS = 2**23
TRIALS = 7


def measure_device(*, ranks: int = 1, compute: Compute = "float32", threads: int | None = None) -> Device:
    """The device of this machine as `ranks` processes that work at the same time see it; threads: of each on a CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_measure_rank, args=(rank, ranks, port, compute, threads, results)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    mean = {key: statistics.mean(each[key] for each in found) for key in found[0]}
    return _device(mean)


def _device(figures: dict[str, float]) -> Device:
    is_gpu = torch.cuda.is_available()
    host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(
        name=torch.cuda.get_device_name().replace(" ", "-") if is_gpu else "CPU",
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if is_gpu else host_memory,
        flops=figures["flops"],
        efficiency=1.0,  # measured ones are what is reached
        attention_efficiency=figures["attention"] / figures["flops"],
        memory_bandwidth=figures["memory"],
        link_bandwidth=figures["link"] / LINK_EFFICIENCY,
        host_bandwidth=figures["host"],
        launch_seconds=figures["launch"],
        has_bfloat16=is_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        is_host=not is_gpu,
    )


def _measure_rank(rank: int, ranks: int, port: int, compute: Compute, threads: int | None, results: Any) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    dtype = getattr(torch, compute)
    is_gpu = device.type == "cuda"
    if not is_gpu:
        keep_freed_memory()  # as a run does: else every new tensor would be paid for in page faults
    figures = {
        "flops": _flops(GPU_SHAPES if is_gpu else CPU_SHAPES, dtype, device),
        "attention": _attention_flops(dtype, device),
        "memory": _memory_bandwidth(GPU_ELEMENTS if is_gpu else CPU_ELEMENTS, device),
        "host": _host_bandwidth(device),
        "launch": _launch_seconds(device),
        "link": _link_bandwidth(ranks, device),
    }
    results.put(figures)
    torch.distributed.destroy_process_group()


def _flops(shapes: tuple[tuple[int, int, int], ...], dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second over all shapes, forward and both gradients, as a linear layer asks for them."""
    seconds, operations = 0.0, 0
    for tokens, inputs, outputs in shapes:
        x = torch.randn(tokens, inputs, dtype=dtype, device=device)
        weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
        grad = torch.randn(tokens, outputs, dtype=dtype, device=device)

        def products(x: torch.Tensor = x, weight: torch.Tensor = weight, grad: torch.Tensor = grad) -> None:
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

        seconds += _seconds(products, device)
        operations += 3 * 2 * tokens * inputs * outputs
    return operations / seconds


def _attention_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of attention in both directions: of a block of rows that sees a policy and itself, under a mask."""
    heads, queries, keys, width = 8, 192, 288, 64
    shapes = ((1, heads, queries, width), (1, heads, keys, width), (1, heads, keys, width))
    query, key, value = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)

    def both_ways() -> None:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output.backward(output)  # type: ignore[no-untyped-call]

    return ATTENTION_PRODUCTS * 4 * queries * keys * heads * width / _seconds(both_ways, device)


def _memory_bandwidth(elements: int, device: torch.device) -> float:
    """Bytes a second of reading two tensors and writing a new one, as element-wise operators do."""
    a, b = torch.randn(elements, device=device), torch.randn(elements, device=device)
    return 3 * 4 * elements / _seconds(lambda: torch.mul(a, b), device)


def _host_bandwidth(device: torch.device) -> float:
    """Bytes a second to the host; within a CPU's own memory, of a copy."""
    here = torch.empty(2**24, device=device)
    there = torch.empty(2**24, pin_memory=device.type == "cuda")
    return here.nbytes / _seconds(lambda: there.copy_(here), device)


def _launch_seconds(device: torch.device) -> float:
    """Of one operator: a layer that is too small to compute anything, divided by the operators that it starts."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    config._attn_implementation = "sdpa"
    layer, rotary = LlamaDecoderLayer(config, 0).to(device), LlamaRotaryEmbedding(config).to(device)
    hidden = torch.randn(1, 8, 16, device=device, requires_grad=True)
    positions = rotary(hidden, torch.arange(8, device=device)[None])

    def both_ways() -> None:
        layer(hidden, position_embeddings=positions).sum().backward()

    return _seconds(both_ways, device) / OPERATORS


def _link_bandwidth(ranks: int, device: torch.device) -> float:
    """Bytes a second of a rank in a ring, from an all-reduce; one rank has no link, and memory stands for it."""
    if ranks == 1:
        return _memory_bandwidth(CPU_ELEMENTS, device)
    gradient = torch.ones(REDUCED_ELEMENTS, device=device)
    volume = 2 * (ranks - 1) / ranks * gradient.nbytes
    return volume / _seconds(lambda: torch.distributed.all_reduce(gradient), device)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median of some trials of at least a tenth of a second each, all ranks at the same time."""
    repeats = 1
    while _shortest(_timed(work, repeats, device), device) < 0.1:
        repeats *= 2
    return statistics.median(_timed(work, repeats, device) for _ in range(TRIALS)) / repeats


def _shortest(seconds: float, device: torch.device) -> float:
    """Of all ranks, so that they repeat equally often: collectives must meet."""
    shared = torch.tensor([seconds], device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MIN)
    return float(shared)


def _timed(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def to_json(device: Device) -> dict[str, Any]:
    """As `guardtrain plan --device` reads it."""
    return dataclasses.asdict(device)
