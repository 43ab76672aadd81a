"""How long an optimizer step takes, by term: computing, attention, element-wise work, operators, optimizer, communication.

A roofline model (Williams et al. 2009): products at the device's rate, everything else at the speed of its memory, and on a GPU
no step is faster than its operators can be started. Communication by the ring algorithms' volumes (Rajbhandari et al. 2020, ZeRO,
section 7); what a GPU can hide behind computing is hidden, on CPUs nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from guardtrain.plan.activations import chunk_tokens, has_adapter, head_trains
from guardtrain.plan.geometry import Geometry
from guardtrain.plan.hardware import Cluster
from guardtrain.plan.setup import Setup, block_tokens
from guardtrain.plan.states import FLOAT, NF4_BYTES, frozen_bytes, trained_layers, trained_parameters

# Reads and writes of a width by element-wise operators in the forward of a layer, and in its backward: two norms and two sums on
# D, rotary positions and copies of heads on H and K, norms on them where there are, activation and product on F; adapters on what
# goes into a matrix and what comes out. Counted in the code of models and adapters.
PASSES_D, PASSES_H, PASSES_F = (20, 40), (22, 32), (5, 9)
PASSES_OF_QK_NORM, PASSES_IN, PASSES_OUT = (7, 17), (1, 5), (6, 4)
SOFTMAX_PASSES = 12
COPIES_OF_GRADIENTS = 9
# Forward 1, backward 2.5 of it (Dao 2023, FlashAttention-2, section 4.1).
ATTENTION_PRODUCTS = 3.5
# Operators that a layer starts in forward and backward; each adapter adds its own.
OPERATORS, OPERATORS_OF_AN_ADAPTER = 260, 16
# DeepSpeed's hooks, in Python: ZeRO-3's gather the weights of every module of a layer and let them go, the others' take each
# gradient. Not counted but fitted: a millisecond each where an operator took 3 microseconds (benchmarks/results/plan_cpu.json).
MODULES, MODULES_OF_AN_ADAPTER, MATRICES_AND_NORMS, OPERATORS_OF_A_HOOK = 13, 3, 9, 300
# AdamW reads weight, gradient and moments and writes three of them; the gradient's norm reads it, clipping changes it.
OPTIMIZER_BYTES = 4 * (7 + 3)
# Of bandwidth between GPUs, what collectives of large messages reach.
LINK_EFFICIENCY = 0.8
# Of communication that could be hidden behind computing, what is.
HIDDEN = 0.9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by term; `total` counts what is not hidden behind something else."""

    terms: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.terms.values())


def step_time(geometry: Geometry, setup: Setup, cluster: Cluster) -> StepTime:
    """An optimizer step of `setup.accumulation` packs on each of the cluster's ranks."""
    packs, device = setup.accumulation, cluster.device
    terms = {
        "products": packs * product_flops(geometry, setup) / (device.flops * device.efficiency),
        "attention": packs * attention_flops(geometry, setup) / (device.flops * device.attention_efficiency),
        "element-wise": packs * elementwise_bytes(geometry, setup, is_host=device.is_host) / device.memory_bandwidth,
        "unpacking 4 bits": packs * unpacking_bytes(geometry, setup) / device.memory_bandwidth,
    }
    started = packs * operators(geometry, setup) * device.launch_seconds
    busy = sum(terms.values())
    terms["operators"] = started if device.is_host else max(0.0, started - busy)
    computing = busy + terms["operators"]
    terms["optimizer"] = _optimizer_seconds(geometry, setup, cluster)
    terms["transfers to the host"] = _offload_seconds(geometry, setup, cluster)
    communication = communication_seconds(geometry, setup, cluster)
    terms["communication"] = communication if device.is_host else max(communication - HIDDEN * computing, 0.1 * communication)
    return StepTime({name: seconds for name, seconds in terms.items() if seconds})


def product_flops(geometry: Geometry, setup: Setup) -> float:
    """Multiplications and additions of all matrix products of a pack: forward, gradients of inputs, gradients of weights."""
    tokens, pack = setup.pack.tokens, setup.pack
    layers, below = trained_layers(geometry, setup), geometry.num_layers - trained_layers(geometry, setup)
    passes = 2 + (0 if setup.is_adapter else 1) + setup.gradient_checkpointing
    one_layer = 2 * tokens * geometry.linear_parameters_of_a_layer
    adapters = 3 * 2 * tokens * trained_parameters(geometry, setup) if setup.is_adapter else 0
    head = (3 if head_trains(setup) else 2) * 2 * pack.supervised_tokens * geometry.embedding_parameters
    return one_layer * (layers * passes + below) + adapters + head


def attention_flops(geometry: Geometry, setup: Setup) -> float:
    """Of scores and weighted sums, forward and backward."""
    pack = setup.pack
    seen = pack.seen_tokens
    if setup.attention == "sdpa":  # masks are computed through
        seen = pack.root_tokens + block_tokens(pack)
    one_layer = 4 * pack.tokens * seen * geometry.query_width
    layers, below = trained_layers(geometry, setup), geometry.num_layers - trained_layers(geometry, setup)
    return one_layer * (layers * (ATTENTION_PRODUCTS + setup.gradient_checkpointing) + below)


def elementwise_bytes(geometry: Geometry, setup: Setup, *, is_host: bool) -> float:
    """Memory traffic of what is no product: norms, rotary positions, activation, sums, softmax over the vocabulary.

    is_host: on a CPU a number in half precision counts as one of float32, for it is converted for any arithmetic: there the
    activation takes 1.3 times as long as in float32, and a product of two tensors 0.7 to 1.4 times (measured, with AVX512-BF16).
    """
    compute_bytes = FLOAT if is_host else setup.compute_bytes
    forward, backward = (_passed_by_layer(geometry, setup, way, compute_bytes) for way in (0, 1))
    layers, below = trained_layers(geometry, setup), geometry.num_layers - trained_layers(geometry, setup)
    per_token = forward * (layers * (1 + setup.gradient_checkpointing) + below) + backward * layers
    softmax = SOFTMAX_PASSES * FLOAT * setup.pack.supervised_tokens * geometry.vocab_size
    chunks = -(-setup.pack.supervised_tokens // chunk_tokens(geometry, setup))
    gradients = 3 * setup.trained_bytes * geometry.embedding_parameters * chunks if head_trains(setup) else 0
    # Gradients and their sums over packs; DeepSpeed copies them into buckets, float32, ranks' parts and one piece.
    written = (3 if setup.engine is None else COPIES_OF_GRADIENTS) * FLOAT * trained_parameters(geometry, setup)
    return setup.pack.tokens * per_token + softmax + gradients + written


def _passed_by_layer(geometry: Geometry, setup: Setup, way: int, compute: int) -> float:
    """Bytes a token that a layer's element-wise operators read and write. way: 0 forward, 1 backward. compute: of a number."""
    heads = geometry.query_width + geometry.kv_width
    passed = FLOAT * PASSES_D[way] * geometry.hidden_size
    passed += compute * (PASSES_H[way] * heads + PASSES_F[way] * geometry.intermediate_size)
    if geometry.has_qk_norm:
        passed += FLOAT * PASSES_OF_QK_NORM[way] * heads
    if setup.is_adapter:
        adapted = [shape for name, shape in geometry.linear_shapes.items() if has_adapter(name, setup)]
        passed += compute * sum(PASSES_IN[way] * inputs + PASSES_OUT[way] * outputs for inputs, outputs in adapted)
    return float(passed)


def unpacking_bytes(geometry: Geometry, setup: Setup) -> float:
    """Of 4-bit weights: read and written in the computing format before every product with them."""
    if setup.method != "qlora":
        return 0.0
    matrices = geometry.num_layers * geometry.linear_parameters_of_a_layer
    return (2 + setup.gradient_checkpointing) * matrices * (NF4_BYTES + 2 * setup.compute_bytes)


def operators(geometry: Geometry, setup: Setup) -> float:
    """How many operators a pack starts, and what else takes the time of as many."""
    adapted = sum(has_adapter(name, setup) for name in geometry.linear_shapes) if setup.is_adapter else 0
    one_layer = OPERATORS + adapted * OPERATORS_OF_AN_ADAPTER
    if setup.engine is not None and setup.engine.stage == 3:
        one_layer += (MODULES + adapted * MODULES_OF_AN_ADAPTER) * OPERATORS_OF_A_HOOK
    elif setup.engine is not None:
        one_layer += (2 * adapted if setup.is_adapter else MATRICES_AND_NORMS) * OPERATORS_OF_A_HOOK
    layers, below = trained_layers(geometry, setup), geometry.num_layers - trained_layers(geometry, setup)
    return one_layer / 3 * (layers * (3 + setup.gradient_checkpointing) + below)


def communication_seconds(geometry: Geometry, setup: Setup, cluster: Cluster) -> float:
    """Of one optimizer step, before any of it is hidden."""
    if setup.ranks == 1:
        return 0.0
    engine, ring = setup.engine, (setup.ranks - 1) / setup.ranks
    trained = trained_parameters(geometry, setup)
    everywhere = _bandwidth(cluster)
    if engine is None:
        return 2 * ring * FLOAT * trained / everywhere  # all-reduce
    if engine.stage < 3:
        reduced = 2 * ring * FLOAT * trained * (setup.accumulation if engine.stage == 2 else 1)
        return (reduced + ring * setup.compute_bytes * trained) / everywhere
    gathered = frozen_bytes(geometry, setup) + setup.compute_bytes * trained
    in_node = LINK_EFFICIENCY * cluster.device.link_bandwidth
    backward = in_node if engine.hpz_ranks > 1 else everywhere
    gathers = ring * gathered * (1 / everywhere + 1 / backward) * setup.accumulation
    return gathers + ring * FLOAT * trained * setup.accumulation / everywhere


def _bandwidth(cluster: Cluster) -> float:
    """Of a ring through all GPUs, bytes a second: it enters and leaves each node once, over all network cards side by side."""
    link = cluster.device.link_bandwidth
    return LINK_EFFICIENCY * (min(link, cluster.network_bandwidth) if cluster.nodes > 1 else link)


# Of a two-socket server with eight channels each, what DeepSpeed's optimizer on the host reaches.
HOST_MEMORY_BANDWIDTH = 200e9


def _optimizer_seconds(geometry: Geometry, setup: Setup, cluster: Cluster) -> float:
    trained, engine = trained_parameters(geometry, setup), setup.engine
    share = trained if engine is None else trained / setup.ranks
    if engine is not None and engine.offload_optimizer:
        return OPTIMIZER_BYTES * share * cluster.gpus_per_node / HOST_MEMORY_BANDWIDTH
    return OPTIMIZER_BYTES * share / cluster.device.memory_bandwidth


def _offload_seconds(geometry: Geometry, setup: Setup, cluster: Cluster) -> float:
    """Gradients down and weights up, and under offloaded weights every layer up for the forward and for the backward."""
    engine, trained = setup.engine, trained_parameters(geometry, setup) / setup.ranks
    if engine is None or cluster.device.is_host:
        return 0.0
    moved = (FLOAT + setup.compute_bytes) * trained if engine.offload_optimizer else 0.0
    if engine.offload_weights:
        whole = frozen_bytes(geometry, setup) / setup.ranks + setup.compute_bytes * trained
        moved += 2 * whole * setup.accumulation
    return moved / cluster.device.host_bandwidth
