"""Which way of training fits a cluster, and which of those is the fastest."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from guardtrain.config import Recipe
from guardtrain.errors import ConfigError
from guardtrain.plan.geometry import Geometry
from guardtrain.plan.hardware import GIB, Cluster
from guardtrain.plan.host import HostNeeds, host_needs
from guardtrain.plan.memory import Moment, peak
from guardtrain.plan.setup import Attention, Compute, Method, Setup, setup_of
from guardtrain.plan.states import frozen_bytes
from guardtrain.plan.step_time import StepTime, step_time
from guardtrain.plan.workload import Workload

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
ALONE = ("ddp", "zero2_offload", "zero3_offload")
TOGETHER = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload")
PACK_BUDGETS = (1024, 2048, 4096, 8192, 16384)
# Packed weights that are offloaded or copied within a node: no test of ours covers them.
UNTRIED_WITH_4_BITS = ("zero3_offload", "zero3_hpz")
# A GPU's context, libraries' workspaces and the buffers of collectives; measured ones differ by some hundred MB.
CONTEXT_BYTES = 1.2 * GIB
# Of what comes and goes, what the allocator cannot use again.
FRAGMENTATION = 0.06
# Slower by less than this counts as equal, and the simpler way wins.
EQUAL = 0.03
MOST_NODES = 1024


@dataclass(frozen=True)
class Problem:
    """Why a candidate cannot be run: in two words and in a sentence."""

    kind: str
    what: str

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train on one cluster. reserved_bytes: context and what the allocator cannot use again, beside the peak.

    packs_per_step: of all ranks; problem: why it cannot be run, None where it can.
    """

    cluster: Cluster
    strategy: str
    setup: Setup
    packs_per_step: int
    peak: Moment
    reserved_bytes: float
    host: HostNeeds
    time: StepTime
    rows_per_second: float
    problem: Problem | None

    @property
    def device_bytes(self) -> float:
        """What one GPU must hold."""
        return self.peak.total + self.reserved_bytes

    @property
    def simplicity(self) -> int:
        """Of two equally fast ways, the one with less machinery."""
        return TOGETHER.index(self.strategy)

    @property
    def is_plain(self) -> bool:
        """Whether one process trains without an engine: what `guardtrain train` starts."""
        return self.cluster.ranks == 1 and self.setup.engine is None

    @property
    def tokens_per_step(self) -> int:
        """Budgets of all packs of an optimizer step."""
        return self.packs_per_step * self.setup.pack.budget


@dataclass(frozen=True, kw_only=True)
class Plan:
    """asked: the recipe as it stands; candidates: all that were looked at; chosen: the fastest that fits with the recipe's
    method, None when nothing does. nearest_cluster, nearest_method: what would, then."""

    recipe: Recipe
    geometry: Geometry
    workload: Workload
    cluster: Cluster
    asked: Candidate
    candidates: list[Candidate]
    chosen: Candidate | None
    nearest_cluster: Candidate | None = None
    nearest_method: Candidate | None = None


def make_plan(recipe: Recipe, geometry: Geometry, workload: Workload, cluster: Cluster) -> Plan:
    """Look at every way to train `recipe` on `cluster`. Raises ConfigError for packs that hold no row."""
    candidates = list(_candidates(recipe, geometry, workload, cluster, METHODS))
    method = recipe.model.method
    chosen = best([each for each in candidates if each.setup.method == method])
    plan = Plan(
        recipe=recipe,
        geometry=geometry,
        workload=workload,
        cluster=cluster,
        asked=as_asked(recipe, geometry, workload, cluster),
        candidates=candidates,
        chosen=chosen,
    )
    if chosen is not None:
        return plan
    others = [best([each for each in candidates if each.setup.method == other]) for other in METHODS]
    return dataclasses.replace(
        plan,
        nearest_cluster=nearest_cluster(recipe, geometry, workload, cluster),
        nearest_method=next((each for each in others if each is not None), None),  # full before lora before qlora
    )


def best(candidates: list[Candidate]) -> Candidate | None:
    """The simplest of the fastest that can be run."""
    fitting = [each for each in candidates if each.problem is None]
    if not fitting:
        return None
    fastest = max(each.rows_per_second for each in fitting)
    as_fast = [each for each in fitting if each.rows_per_second >= fastest * (1 - EQUAL)]
    return min(as_fast, key=lambda each: (each.simplicity, each.setup.gradient_checkpointing, each.setup.pack.budget))


def as_asked(recipe: Recipe, geometry: Geometry, workload: Workload, cluster: Cluster) -> Candidate:
    """The recipe as it stands, under its strategy or what `auto` comes to."""
    strategy, packs = recipe.distributed.strategy, recipe.train.packs_per_step
    found = candidate(recipe, geometry, workload, cluster, "ddp" if strategy == "auto" else strategy)
    if packs != found.packs_per_step and found.problem is None:
        what = f"train.packs_per_step={packs} cannot be shared out among {cluster.ranks} ranks; {found.packs_per_step} can"
        return dataclasses.replace(found, problem=Problem("packs a step", what))
    return found


def nearest_cluster(recipe: Recipe, geometry: Geometry, workload: Workload, cluster: Cluster) -> Candidate | None:
    """The recipe's method on the least of the same devices that will do: more on a node up to eight, then more nodes."""
    for larger in _larger(cluster):
        candidates = _candidates(recipe, geometry, workload, larger, (recipe.model.method,))
        if (found := best(list(candidates))) is not None:
            return found
    return None


def candidate(recipe: Recipe, geometry: Geometry, workload: Workload, cluster: Cluster, strategy: str) -> Candidate:
    """What `recipe` needs on `cluster` under `strategy`."""
    ranks = cluster.ranks
    packs = max(ranks, round(recipe.train.packs_per_step / ranks) * ranks)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, packs_per_step=packs))
    compute = compute_format(recipe, cluster)
    backend = attention(recipe, cluster)
    # As model/attention says: the kernels of flex are compiled for a length.
    pack = workload.pack(recipe.train.pack_tokens, is_padded=backend == "flex")
    setup = setup_of(recipe, strategy, ranks=ranks, pack=pack, compute=compute, attention=backend)
    return assess(geometry, workload, cluster, strategy, setup)


def assess(geometry: Geometry, workload: Workload, cluster: Cluster, strategy: str, setup: Setup) -> Candidate:
    """What `setup` needs on `cluster`."""
    highest = peak(geometry, setup)
    time = step_time(geometry, setup, cluster)
    static = highest.parts.get("weights", 0) + highest.parts.get("optimizer", 0)
    packs = setup.accumulation * setup.ranks
    found = Candidate(
        cluster=cluster,
        strategy=strategy,
        setup=setup,
        packs_per_step=packs,
        peak=highest,
        reserved_bytes=0.0 if cluster.device.is_host else CONTEXT_BYTES + FRAGMENTATION * (highest.total - static),
        host=host_needs(geometry, setup, cluster),
        time=time,
        rows_per_second=packs * workload.rows_of_pack(setup.pack.budget) / time.total,
        problem=None,
    )
    return dataclasses.replace(found, problem=_problem(found, geometry) or _too_few_rows(found, workload))


def compute_format(recipe: Recipe, cluster: Cluster) -> Compute:
    """What `model.dtype` comes to on the cluster's devices."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    if cluster.device.has_bfloat16:
        return "bfloat16"
    return "float32" if cluster.device.is_host else "float16"


def attention(recipe: Recipe, cluster: Cluster) -> Attention:
    """What `model.attention` comes to."""
    if recipe.model.attention != "auto":
        return recipe.model.attention
    return "sdpa" if cluster.device.is_host else "flex"


def _candidates(
    recipe: Recipe, geometry: Geometry, workload: Workload, cluster: Cluster, methods: tuple[Method, ...]
) -> Iterator[Candidate]:
    methods = methods if recipe.model.method in methods else (recipe.model.method, *methods)
    strategies = TOGETHER if cluster.ranks > 1 else ALONE
    budgets = sorted({recipe.train.pack_tokens, *PACK_BUDGETS})
    for method, strategy, checkpointing, budget in itertools.product(methods, strategies, (False, True), budgets):
        if method == "qlora" and strategy in UNTRIED_WITH_4_BITS:
            continue
        with_packs = _recipe_with(recipe, method, budget, checkpointing=checkpointing)
        try:
            yield candidate(with_packs, geometry, workload, cluster, strategy)
        except ConfigError:  # no room for a row in so small a pack
            continue


def _recipe_with(recipe: Recipe, method: Method, budget: int, *, checkpointing: bool) -> Recipe:
    """The recipe with other packs and as many tokens a step as before."""
    train = recipe.train
    packs = max(1, round(train.packs_per_step * train.pack_tokens / budget))
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, method=method),
        train=dataclasses.replace(train, pack_tokens=budget, packs_per_step=packs, gradient_checkpointing=checkpointing),
    )


def _problem(found: Candidate, geometry: Geometry) -> Problem | None:
    cluster, setup = found.cluster, found.setup
    device = cluster.device
    limit = device.memory_bytes / (cluster.gpus_per_node if device.is_host else 1)
    whole = frozen_bytes(geometry, setup)
    if setup.method == "qlora" and whole + CONTEXT_BYTES > limit:
        what = f"every rank loads the 4-bit weights whole, {whole / GIB:.1f} of {limit / GIB:.1f} GiB: ZeRO-3 cannot split them"
        return Problem("4-bit load", what)
    if setup.compute == "bfloat16" and not device.has_bfloat16 and not device.is_host:
        return Problem("no bfloat16", f"a {device.name} has no bfloat16; model.dtype=float16")
    if setup.engine is not None and setup.engine.hpz_ranks > 1:
        if cluster.nodes == 1:
            return Problem("one node", "hpZ keeps copies inside of each of several nodes")
        if setup.engine.hpz_ranks != cluster.gpus_per_node:
            return Problem("node size", f"ds_configs/zero3_hpz.json is for nodes of {setup.engine.hpz_ranks} GPUs")
    if found.device_bytes > limit:
        rank = "rank" if device.is_host else "GPU"
        return Problem(f"{rank} memory", f"it needs {found.device_bytes / GIB:.1f} of {limit / GIB:.1f} GiB on each {rank}")
    if found.host.total > cluster.host_bytes:
        needed, there = found.host.total / GIB, cluster.host_bytes / GIB
        return Problem("host memory", f"it needs {needed:.0f} of {there:.0f} GiB on each host")
    return None


def _too_few_rows(found: Candidate, workload: Workload) -> Problem | None:
    if workload.rows >= found.packs_per_step:
        return None
    return Problem("too few rows", f"{workload.rows} rows cannot fill the {found.packs_per_step} packs of a step")


def _larger(cluster: Cluster) -> Iterator[Cluster]:
    gpus, nodes = cluster.gpus_per_node, cluster.nodes
    while gpus < 8 and nodes == 1:
        gpus *= 2
        yield _resized(cluster, 1, gpus)
    while nodes < MOST_NODES:
        nodes *= 2
        yield _resized(cluster, nodes, gpus)


def _resized(cluster: Cluster, nodes: int, gpus: int) -> Cluster:
    """The same kind of node; with more GPUs it has more memory of its own too."""
    host = cluster.host_bytes * gpus // cluster.gpus_per_node
    return dataclasses.replace(cluster, nodes=nodes, gpus_per_node=gpus, host_bytes=host)
