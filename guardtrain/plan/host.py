"""The memory of a node's host, and disk: bytes."""

from __future__ import annotations

from dataclasses import dataclass

from guardtrain.plan.geometry import Geometry
from guardtrain.plan.hardware import GIB, Cluster
from guardtrain.plan.setup import Setup
from guardtrain.plan.states import FLOAT, frozen_bytes, optimizer_share, trained_parameters

# A Python process with torch, transformers and DeepSpeed, a GPU's driver included.
PROCESS_BYTES = 3 * GIB
# Files of published models; those that transformers writes.
READ_BYTES, WRITTEN_BYTES = 5e9, 50e9


@dataclass(frozen=True, kw_only=True)
class HostNeeds:
    """Bytes of one node: processes, what is offloaded, and at the start and the end of a run the loading and the saving."""

    processes: float
    offloaded: float
    loading: float
    saving: float

    @property
    def total(self) -> float:
        """The most at a time: nothing is offloaded yet while weights are loaded."""
        return self.processes + max(self.offloaded + self.saving, self.loading)


def host_needs(geometry: Geometry, setup: Setup, cluster: Cluster) -> HostNeeds:
    """What every node of `cluster` must have."""
    here = cluster.gpus_per_node
    return HostNeeds(
        processes=0.0 if cluster.device.is_host else PROCESS_BYTES * here,
        offloaded=here * offloaded(geometry, setup),
        loading=here * loading(geometry, setup),
        saving=saving(geometry, setup),
    )


def offloaded(geometry: Geometry, setup: Setup) -> float:
    """Of one rank: float32 copies, moments and gradients, and its share of the weights."""
    engine, trained = setup.engine, trained_parameters(geometry, setup)
    if engine is None:
        return 0.0
    held = 0.0
    if engine.offload_optimizer == "cpu":
        held += optimizer_share(geometry, setup) + FLOAT * trained / setup.ranks
    if engine.offload_weights == "cpu":
        held += (frozen_bytes(geometry, setup) + setup.compute_bytes * trained) / setup.ranks
    return held


def loading(geometry: Geometry, setup: Setup) -> float:
    """Of one rank. 4-bit weights go to the GPU file by file; under ZeRO-3 each rank reads its share, which it keeps; else all
    weights are whole in the format that they train in before they go to the GPU."""
    if setup.method == "qlora":
        return 2 * min(READ_BYTES, setup.compute_bytes * geometry.parameters)
    if setup.engine is not None and setup.engine.stage == 3:
        return setup.compute_bytes * geometry.parameters / setup.ranks
    return float(setup.weight_bytes * geometry.parameters)


def saving(geometry: Geometry, setup: Setup) -> float:
    """Of the main rank: an adapter whole; under ZeRO-3 one tensor of the model, else one file."""
    if setup.is_adapter:
        return float(2 * FLOAT * trained_parameters(geometry, setup))
    if setup.engine is not None and setup.engine.stage == 3:
        return float(setup.compute_bytes * geometry.embedding_parameters)
    return float(min(WRITTEN_BYTES, setup.weight_bytes * geometry.parameters))


def checkpoint_bytes(trained: int, total: int, *, is_adapter: bool, compute_bytes: int, zero_stage: int | None) -> int:
    """The size of one checkpoint from its parameter counts, before it is written; tokenizer and state, a few MB, come on top.

    compute_bytes: of one number in the computing format. zero_stage: None without DeepSpeed. Adam keeps two float32 numbers for
    each trained one, DeepSpeed a float32 copy of it besides.
    """
    frozen = 0 if is_adapter else total - trained
    if zero_stage is None:
        return (4 + 8) * trained + compute_bytes * frozen
    # ZeRO-3 has no whole weights to write: what trains is in the float32 copies alone. An adapter is written besides, to be used.
    whole = trained if zero_stage < 3 else 0
    return 12 * trained + compute_bytes * (whole + frozen + (trained if is_adapter else 0))
