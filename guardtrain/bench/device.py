"""Measures a device for the planner: what products, memory, operators and collectives reach while all ranks are at work.

Products and attention of small matrices reach less than those of large ones, attention of narrow heads in half precision on a CPU
less than half of it: `shapes_of` has them measured as a recipe's model and packs have them.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from guardtrain.allocator import keep_freed_memory
from guardtrain.config import Recipe
from guardtrain.plan.activations import has_adapter, head_trains
from guardtrain.plan.geometry import Geometry, read_geometry
from guardtrain.plan.hardware import Device
from guardtrain.plan.setup import Compute, Setup, block_tokens, setup_of
from guardtrain.plan.step_time import ATTENTION_PRODUCTS, LINK_EFFICIENCY, OPERATORS
from guardtrain.plan.workload import workload_of


@dataclass(frozen=True)
class Product:
    """A linear layer's: (tokens, inputs) times (inputs, outputs), `count` times. trains: whether its weights do."""

    tokens: int
    inputs: int
    outputs: int
    count: int = 1
    trains: bool = True

    @property
    def operations(self) -> int:
        """Multiplications and additions of the forward, of the inputs' gradient and, where it trains, the weights'."""
        return self.count * (3 if self.trains else 2) * 2 * self.tokens * self.inputs * self.outputs


@dataclass(frozen=True)
class Shapes:
    """What is measured: products, and attention of a block of rows, `queries` that see a policy and themselves: `keys`."""

    products: tuple[Product, ...]
    heads: int = 8
    queries: int = 192
    keys: int = 288
    width: int = 64


# As in models of 0.1 to 1 billion parameters. Large GPUs are measured on larger ones.
CPU_SHAPES = Shapes((Product(512, 576, 1536), Product(512, 1024, 3072), Product(512, 1536, 576)))
GPU_SHAPES = Shapes((Product(4096, 4096, 14336), Product(4096, 4096, 4096), Product(4096, 14336, 4096)))
# Far more than caches hold: what of 64 MiB lies in one differs from run to run, and with it the result by half.
CPU_ELEMENTS, GPU_ELEMENTS = 2**26, 2**27
REDUCED_ELEMENTS = 2**23
TRIALS = 7


def shapes_of(geometry: Geometry, setup: Setup) -> Shapes:
    """The products of one pack, and where sdpa computes attention one block of it, as `setup` has them."""
    pack, layers = setup.pack, geometry.num_layers
    products = [
        Product(pack.tokens, *shape, count=layers, trains=not setup.is_adapter) for shape in geometry.linear_shapes.values()
    ]
    products.append(Product(pack.supervised_tokens, geometry.hidden_size, geometry.vocab_size, trains=head_trains(setup)))
    if setup.is_adapter:
        adapted = [shape for name, shape in geometry.linear_shapes.items() if has_adapter(name, setup)]
        products += [Product(pack.tokens, inputs, setup.lora_rank, count=layers) for inputs, _ in adapted]
        products += [Product(pack.tokens, setup.lora_rank, outputs, count=layers) for _, outputs in adapted]
    if setup.attention != "sdpa":
        return Shapes(tuple(products))
    block = round(block_tokens(pack))
    return Shapes(tuple(products), geometry.num_heads, block, pack.root_tokens + block, geometry.head_dim)


def shapes_of_recipe(recipe: Recipe, compute: Compute, *, geometry: str | None = None, rows: int | None = None) -> Shapes:
    """`shapes_of` a recipe as it trains on this machine. geometry, rows: for a model and data that are elsewhere."""
    attention = recipe.model.attention
    if attention == "auto":
        attention = "flex" if torch.cuda.is_available() else "sdpa"
    pack = workload_of(recipe, rows=rows).pack(recipe.train.pack_tokens, is_padded=attention == "flex")
    setup = setup_of(recipe, "ddp", ranks=1, pack=pack, compute=compute, attention=attention)
    return shapes_of(read_geometry(geometry or recipe.model.name), setup)


def measure_device(
    *, ranks: int = 1, compute: Compute = "float32", threads: int | None = None, shapes: Shapes | None = None
) -> Device:
    """The device of this machine as `ranks` processes that work at the same time see it.

    threads: of each on a CPU. shapes: None for usual ones.
    """
    shapes = shapes or (GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_measure_rank, args=(rank, ranks, port, compute, threads, shapes, results))
        for rank in range(ranks)
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


def _measure_rank(rank: int, ranks: int, port: int, compute: Compute, threads: int | None, shapes: Shapes, results: Any) -> None:
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
        "flops": _flops(shapes.products, dtype, device),
        "attention": _attention_flops(shapes, dtype, device),
        "memory": _memory_bandwidth(GPU_ELEMENTS if is_gpu else CPU_ELEMENTS, device),
        "host": _host_bandwidth(device),
        "launch": _launch_seconds(device),
        "link": _link_bandwidth(ranks, device),
    }
    results.put(figures)
    torch.distributed.destroy_process_group()


def _flops(products: tuple[Product, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second over all products, as linear layers ask for them."""
    seconds = 0.0
    for product in products:
        x = torch.randn(product.tokens, product.inputs, dtype=dtype, device=device)
        weight = torch.randn(product.outputs, product.inputs, dtype=dtype, device=device)
        grad = torch.randn(product.tokens, product.outputs, dtype=dtype, device=device)

        seconds += product.count * _seconds(partial(_multiply, x, weight, grad, trains=product.trains), device)
    return sum(product.operations for product in products) / seconds


def _multiply(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, *, trains: bool) -> None:
    """The products of a linear layer: its output, its input's gradient and, where it trains, its weights'."""
    torch.mm(x, weight.t())
    torch.mm(grad, weight)
    if trains:
        torch.mm(grad.t(), x)


def _attention_flops(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of attention in both directions: of a block of rows that sees a policy and itself, under a mask."""
    heads, queries, keys, width = shapes.heads, shapes.queries, shapes.keys, shapes.width
    sizes = ((1, heads, queries, width), (1, heads, keys, width), (1, heads, keys, width))
    query, key, value = (torch.randn(size, dtype=dtype, device=device, requires_grad=True) for size in sizes)
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
