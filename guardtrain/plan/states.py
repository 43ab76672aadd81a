"""Weights, gradients and optimizer states: what a run holds however long its packs are. Bytes throughout."""

from __future__ import annotations

from guardtrain.plan.geometry import Geometry
from guardtrain.plan.setup import Setup

FLOAT = 4
# AdamW's two moments, float32.
MOMENTS = 8
# Blocks of 64 weights share an 8-bit scale, 256 of these a float32 one (double quantisation): 4 + 8/64 + 32/(64*256) bits.
# Dettmers et al. 2023, QLoRA, section 3.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def trained_parameters(geometry: Geometry, setup: Setup) -> int:
    """How many parameters the method trains."""
    if setup.is_adapter:
        return geometry.lora_parameters(setup.lora_rank, setup.lora_targets)
    if setup.method == "freeze":
        return trained_layers(geometry, setup) * geometry.parameters_of_a_layer + geometry.hidden_size
    return geometry.parameters


def trained_layers(geometry: Geometry, setup: Setup) -> int:
    """Layers that keep something for the backward: with freeze only the last."""
    return min(setup.trained_layers, geometry.num_layers) if setup.method == "freeze" else geometry.num_layers


def frozen_bytes(geometry: Geometry, setup: Setup) -> float:
    """What the weights that do not train are stored in."""
    if not setup.is_adapter:
        return float(setup.weight_bytes * (geometry.parameters - trained_parameters(geometry, setup)))
    if setup.method == "lora":
        return float(setup.weight_bytes * geometry.parameters)
    quantised = geometry.num_layers * geometry.linear_parameters_of_a_layer
    return NF4_BYTES * quantised + setup.weight_bytes * (geometry.parameters - quantised)


def weights(geometry: Geometry, setup: Setup) -> float:
    """All weights of one rank's GPU, as the layers compute with them."""
    whole = frozen_bytes(geometry, setup) + setup.trained_bytes * trained_parameters(geometry, setup)
    engine = setup.engine
    if engine is None or engine.stage < 3:
        return whole
    share = 0.0 if engine.offload_weights else whole / setup.ranks
    # hpZ: the node's own copy beside the share of all.
    return share + (whole / engine.hpz_ranks if engine.hpz_ranks > 1 else 0.0)


def optimizer(geometry: Geometry, setup: Setup) -> float:
    """Adam's moments, and DeepSpeed's float32 copies, on one rank's GPU."""
    trained, engine = trained_parameters(geometry, setup), setup.engine
    if engine is None:
        return float(MOMENTS * trained)
    return 0.0 if engine.offload_optimizer else optimizer_share(geometry, setup)


def optimizer_share(geometry: Geometry, setup: Setup) -> float:
    """Adam's moments and float32 copies of one rank under DeepSpeed, wherever they lie."""
    return (MOMENTS + FLOAT) * trained_parameters(geometry, setup) / setup.ranks


def partition_elements(geometry: Geometry, ranks: int) -> int:
    """Elements of all weights that ZeRO-3 leaves on each of `ranks`: every tensor is split evenly, the last parts padded."""
    sizes = [inputs * outputs for inputs, outputs in geometry.linear_shapes.values()] + geometry.vector_sizes
    per_layer = sum(-(-size // ranks) for size in sizes)
    tables = 1 if geometry.tied else 2
    return (
        geometry.num_layers * per_layer + -(-geometry.hidden_size // ranks) + tables * -(-geometry.embedding_parameters // ranks)
    )
