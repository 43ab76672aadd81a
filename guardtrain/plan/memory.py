"""The peak of a GPU's memory in an optimizer step, by kind: bytes on one rank.

A step has a few moments that can be the highest: the loss at the output layer, when everything is kept for the backward; the
first layer's backward and the first exchange of gradients, when nearly all of it still is; the end of the backward, when all
gradients lie there; and the optimizer's turn. The highest one is the peak, and its parts say what to save on.

What DeepSpeed holds when was read in its sources (0.19: runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py and
runtime/bf16_optimizer.py) and seen in tensor counts of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from guardtrain.plan import activations, states
from guardtrain.plan.geometry import Geometry
from guardtrain.plan.setup import Engine, Setup
from guardtrain.plan.states import FLOAT, trained_parameters

DOUBLE = 8
# DeepSpeed's own, not in its file: elements that ZeRO-1 in half precision reduces at a time.
BUCKET_OF_STAGE_1 = 500_000_000

Parts = dict[str, float]


@dataclass(frozen=True)
class Moment:
    """A point of the step and what lies in memory then, bytes by kind."""

    name: str
    parts: Parts

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(self.parts.values())


def peak(geometry: Geometry, setup: Setup) -> Moment:
    """The highest moment of a step."""
    return max(moments(geometry, setup), key=lambda moment: moment.total)


def moments(geometry: Geometry, setup: Setup) -> list[Moment]:
    """All moments that can be the highest."""
    always = {"weights": states.weights(geometry, setup), "optimizer": states.optimizer(geometry, setup)}
    until_backward = {
        "weights in the computing format": cast_weights(geometry, setup),
        "activations": kept_by_all(geometry, setup),
    }
    before, after = gradients(geometry, setup)
    layer, table = _layer_work(geometry, setup), _table_gradient(geometry, setup)
    gathered, buffers = gathered_weights(geometry, setup), exchange_buffers(geometry, setup)
    logits = activations.head_work(geometry, setup)
    found = {
        "loss": until_backward
        | {"gradients": before, "logits": logits, "gathered weights": gathered, "exchange": buffers * _stays(setup)},
        "first backward": until_backward
        | {"gradients": before + table, "layer": layer, "gathered weights": gathered, "exchange": buffers},
        "last backward": {"gradients": after + _table_gradients(geometry, setup), "layer": layer, "exchange": buffers},
        "optimizer": {"gradients": after, "exchange": buffers * _stays(setup), "step": step_work(geometry, setup)},
    }
    if setup.engine is not None:
        work = exchange_work(geometry, setup)
        early, late = _gradients_when_exchanged(geometry, setup)
        found |= {
            "first exchange": {kind: size * _left_at_first_exchange(geometry, setup) for kind, size in until_backward.items()}
            | {"gradients": early, "exchange": buffers + work, "gathered weights": _without_embedding(gathered, geometry, setup)},
            "last exchange": {
                "gradients": late,
                "exchange": buffers + work,
                "gathered weights": _table_weights(geometry, setup),
            },
        }
    return [Moment(name, {kind: size for kind, size in (always | parts).items() if size}) for name, parts in found.items()]


def kept_by_all(geometry: Geometry, setup: Setup) -> float:
    """Activations of all layers until the backward; with freeze only the last layers keep any."""
    one = activations.kept_when_checkpointed if setup.gradient_checkpointing else activations.kept_by_layer
    around = activations.kept_around_layers(geometry, setup)
    return states.trained_layers(geometry, setup) * one(geometry, setup) + around


def cast_weights(geometry: Geometry, setup: Setup) -> float:
    """Copies of what trains that autocast makes once a pack and the backward needs: all matrices, none of the norms."""
    if not setup.autocasts:
        return 0.0
    matrices = trained_parameters(geometry, setup)
    if setup.method == "full" and not geometry.tied:
        matrices -= geometry.embedding_parameters  # a table is looked up, not multiplied
    return float(setup.compute_bytes * matrices)


def gradients(geometry: Geometry, setup: Setup) -> tuple[float, float]:
    """Bytes of gradients that lie there when a pack's backward begins, and when it ends."""
    trained, engine = trained_parameters(geometry, setup), setup.engine
    if engine is None:
        return float(FLOAT * trained * (setup.accumulation > 1)), float(FLOAT * trained)
    if _is_half_stage_1(setup):
        return float(FLOAT * trained), float(FLOAT * trained)  # kept and filled with zeros after a step
    share = 0.0 if engine.offload_optimizer else FLOAT * trained / setup.ranks
    return share * (engine.stage == 3 or setup.accumulation > 1), share


def exchange_buffers(geometry: Geometry, setup: Setup) -> float:
    """What the exchange of gradients holds: DistributedDataParallel's buckets, DeepSpeed's one or two."""
    trained, engine = trained_parameters(geometry, setup), setup.engine
    if engine is None:
        return float(FLOAT * trained) if setup.ranks > 1 else 0.0
    if engine.stage == 3:
        return float(FLOAT * engine.reduce_bucket)
    return 0.0 if _is_half_stage_1(setup) else float(2 * setup.compute_bytes * engine.reduce_bucket)


def exchange_work(geometry: Geometry, setup: Setup) -> float:
    """Copies that the exchange makes of a bucket, or of a table that is larger than one: float32, and the parts for each rank."""
    trained, engine = trained_parameters(geometry, setup), setup.engine
    if engine is None:
        return 0.0
    if _is_half_stage_1(setup):  # once, after the backward
        return float(FLOAT * min(trained, BUCKET_OF_STAGE_1))
    is_large = largest_trained(geometry, setup) > engine.reduce_bucket
    exchanged = largest_trained(geometry, setup) if is_large else min(engine.reduce_bucket, trained)
    is_cast = setup.compute_bytes < FLOAT and (engine.stage < 3 or is_large)
    return float(FLOAT * exchanged * (is_cast + (engine.stage == 3)))


def step_work(geometry: Geometry, setup: Setup) -> float:
    """What the optimizer takes while it runs: gradients in one piece, a float64 copy of the largest for the norm."""
    trained, engine = trained_parameters(geometry, setup), setup.engine
    if engine is None or _is_half_stage_1(setup) or engine.offload_optimizer:
        return 0.0
    share, largest = trained / setup.ranks, largest_trained(geometry, setup)
    if engine.stage == 3:
        return max(FLOAT * min(share, engine.sub_group), DOUBLE * largest / setup.ranks)
    in_one_piece = FLOAT * share if setup.compute_bytes == FLOAT else 0.0
    return max(in_one_piece, DOUBLE * min(largest, share))


def gathered_weights(geometry: Geometry, setup: Setup) -> float:
    """Weights that ZeRO-3 has put together at the output layer: it keeps what the backward will soon need again."""
    engine = setup.engine
    if engine is None or engine.stage < 3:
        return 0.0
    # On the way to the backward each weight is used twice within twice its distance from the output layer.
    kept = min(geometry.parameters, engine.reuse_distance / 2 + geometry.embedding_parameters)
    return float(setup.compute_bytes * (kept + min(engine.prefetch_bucket, geometry.parameters - kept)))


def largest_trained(geometry: Geometry, setup: Setup) -> int:
    """Elements of the largest tensor that trains."""
    matrices = geometry.linear_shapes.values()
    if setup.is_adapter:
        return setup.lora_rank * max(max(shape) for shape in matrices)
    largest = max(inputs * outputs for inputs, outputs in matrices)
    return max(largest, geometry.embedding_parameters) if setup.method == "full" else largest


def _layer_work(geometry: Geometry, setup: Setup) -> float:
    """Of a layer's backward: checkpointed, all that it keeps is there again; 4-bit weights are unpacked."""
    work = activations.layer_work(geometry, setup)
    if setup.gradient_checkpointing:
        work += activations.kept_by_layer(geometry, setup)
    if setup.method == "qlora":
        work += setup.compute_bytes * max(inputs * outputs for inputs, outputs in geometry.linear_shapes.values())
    return work


def _table_gradient(geometry: Geometry, setup: Setup) -> float:
    """The output layer's gradient, the first to come, and the embedding's, the last."""
    return float(setup.trained_bytes * geometry.embedding_parameters) if activations.head_trains(setup) else 0.0


def _table_gradients(geometry: Geometry, setup: Setup) -> float:
    """The embedding's gradient at the end of the backward, and the output layer's where that is held back for it."""
    one = _table_gradient(geometry, setup)
    engine = setup.engine
    if engine is None:
        return one  # the other is one of all
    is_held = geometry.tied or (engine.stage == 1 and not _is_half_stage_1(setup))
    return 2 * one if is_held else one


def _gradients_when_exchanged(geometry: Geometry, setup: Setup) -> tuple[float, float]:
    """At the first exchange of gradients and at the last."""
    before, after = gradients(geometry, setup)
    table = _table_gradient(geometry, setup)
    if _is_half_stage_1(setup):
        return after, after
    # In half precision a rank's share is there from the first exchange on; float32 gradients are their own.
    is_there = setup.compute_bytes < FLOAT or (setup.engine is not None and setup.engine.stage == 3)
    return (after if is_there else before) + table, after + _table_gradients(geometry, setup)


def _left_at_first_exchange(geometry: Geometry, setup: Setup) -> float:
    """Of what is kept for the backward: all where the output layer's gradient is larger than a bucket and goes at once, else what
    is left when a bucket is full."""
    assert setup.engine is not None
    if largest_trained(geometry, setup) > setup.engine.reduce_bucket or _is_half_stage_1(setup):
        return 1.0
    return max(0.0, 1 - setup.engine.reduce_bucket / trained_parameters(geometry, setup))


def _without_embedding(gathered: float, geometry: Geometry, setup: Setup) -> float:
    """Once the output layer's gradient is there, ZeRO-3 has let go of the embedding."""
    table = 0 if geometry.tied else setup.compute_bytes * geometry.embedding_parameters
    return max(gathered - table, _table_weights(geometry, setup))


def _table_weights(geometry: Geometry, setup: Setup) -> float:
    engine = setup.engine
    return float(setup.compute_bytes * geometry.embedding_parameters) if engine is not None and engine.stage == 3 else 0.0


def _is_half_stage_1(setup: Setup) -> bool:
    """ZeRO-1 in half precision is another engine: it sums whole float32 gradients on every rank."""
    return setup.engine is not None and setup.engine.stage == 1 and setup.compute == "bfloat16"


def _stays(setup: Setup) -> bool:
    """Whether the buffers of the exchange outlive the backward."""
    engine: Engine | None = setup.engine
    return engine is None or engine.stage == 3
