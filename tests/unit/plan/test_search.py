"""What fits, what is chosen, and what is said when nothing does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from guardtrain.config import Recipe
from guardtrain.errors import ConfigError
from guardtrain.overrides import load_recipe
from guardtrain.plan.geometry import read_geometry
from guardtrain.plan.hardware import GIB, parse_cluster
from guardtrain.plan.report import commands, hours
from guardtrain.plan.search import EQUAL, UNTRIED_WITH_4_BITS, Plan, as_asked, make_plan
from guardtrain.plan.workload import Workload

WORK = Workload(rows=8000, row_tokens=110, supervised_tokens=30, policy_tokens=200, epochs=3, said="8,000 rows")


def plan(model: str, cluster: str, *overrides: str, **hardware: Any) -> Plan:
    recipe = load_recipe("guard", [f"model.name={model}", *overrides])
    return make_plan(recipe, read_geometry(model), WORK, parse_cluster(cluster, **hardware))


def test_the_chosen_one_fits_and_nothing_that_fits_is_much_faster() -> None:
    found = plan("llama-3.1-8b", "1x8xH100", "model.method=full", "train.packs_per_step=8")
    assert found.chosen is not None
    assert found.chosen.problem is None
    assert found.chosen.device_bytes <= found.cluster.device.memory_bytes
    same = [each for each in found.candidates if each.setup.method == "full" and each.problem is None]
    assert len(same) > 3
    assert max(each.rows_per_second for each in same) <= found.chosen.rows_per_second / (1 - EQUAL)


def test_every_way_is_looked_at() -> None:
    found = plan("llama-3.1-8b", "2x8xH100")
    seen = {(each.setup.method, each.strategy, each.setup.gradient_checkpointing) for each in found.candidates}
    assert len(seen) == 3 * 7 * 2 - len(UNTRIED_WITH_4_BITS) * 2
    assert {each.setup.pack.budget for each in found.candidates} == {1024, 2048, 4096, 8192, 16384}


def test_tokens_of_a_step_stay_about_the_same() -> None:
    found = plan("qwen3-0.6b", "1x4xA100", "train.pack_tokens=4096", "train.packs_per_step=16")
    for each in found.candidates:
        assert each.packs_per_step % 4 == 0
        assert each.tokens_per_step == pytest.approx(4096 * 16, rel=0.01)


def test_where_nothing_fits_the_nearest_cluster_and_method_are_named() -> None:
    found = plan("llama-3.1-70b", "1x8xH100", "model.method=full", "train.packs_per_step=8", host_gib=500)
    assert found.chosen is None
    assert found.nearest_cluster is not None
    assert found.nearest_cluster.problem is None
    assert found.nearest_cluster.cluster.nodes in {2, 4}
    assert found.nearest_cluster.setup.method == "full"
    assert found.nearest_method is not None
    assert found.nearest_method.setup.method == "lora"
    assert found.nearest_method.problem is None
    assert str(found.nearest_method.cluster) == "1x8xH100-80GB"


def test_four_bit_weights_that_do_not_fit_one_gpu_are_refused_with_the_reason() -> None:
    found = plan("llama-3.1-405b", "4x8xH100", "model.method=qlora", "train.packs_per_step=32")
    assert found.chosen is None
    assert {each.problem.kind for each in found.candidates if each.setup.method == "qlora" and each.problem} == {"4-bit load"}
    assert "every rank loads the 4-bit weights whole" in str(found.asked.problem)
    assert found.nearest_cluster is None  # no number of them helps


def test_hpz_needs_nodes_of_the_size_that_its_file_says() -> None:
    kinds = {
        cluster: {
            each.problem.kind for each in plan("qwen3-8b", cluster).candidates if each.strategy == "zero3_hpz" and each.problem
        }
        for cluster in ("1x8xH100", "2x4xH100")
    }
    assert kinds == {"1x8xH100": {"one node"}, "2x4xH100": {"node size"}}


def test_a_device_without_bfloat16_computes_in_float16_and_refuses_to_be_told_otherwise() -> None:
    assert plan("qwen3-0.6b", "T4", "model.method=lora").asked.setup.compute == "float16"
    problem = plan("qwen3-0.6b", "T4", "model.method=lora", "model.dtype=bfloat16").asked.problem
    assert problem is not None
    assert problem.kind == "no bfloat16"


def test_ranks_of_a_cpu_share_its_memory() -> None:
    one = plan("smollm2-135m", "CPU", "model.method=full", host_gib=24).asked
    assert one.problem is None
    recipe: Recipe = load_recipe("guard", ["model.name=smollm2-135m", "model.method=full"])
    many = as_asked(recipe, read_geometry("smollm2-135m"), WORK, parse_cluster("16xCPU", host_gib=24))
    assert many.problem is not None
    assert many.problem.kind == "rank memory"


def test_offload_moves_bytes_from_the_gpu_to_the_host() -> None:
    found = plan("llama-3.1-8b", "1x8xA100", "model.method=full", "train.packs_per_step=8")
    by_strategy = {
        each.strategy: each
        for each in found.candidates
        if each.setup.method == "full" and each.setup.pack.budget == 2048 and each.setup.gradient_checkpointing
    }
    split, offloaded = by_strategy["zero3"], by_strategy["zero3_offload"]
    assert split.device_bytes - offloaded.device_bytes > 8 * GIB
    assert offloaded.host.total - split.host.total > 8 * GIB
    assert offloaded.time.total > split.time.total
    assert by_strategy["zero2"].device_bytes < by_strategy["zero1"].device_bytes * 1.01 < by_strategy["ddp"].device_bytes


def test_packs_that_hold_no_row_are_refused() -> None:
    recipe = load_recipe("guard", ["train.pack_tokens=256"])
    with pytest.raises(ConfigError, match=r"train\.pack_tokens"):
        as_asked(recipe, read_geometry("qwen3-0.6b"), dataclasses.replace(WORK, row_tokens=300), parse_cluster("H100"))


def test_more_of_anything_takes_more() -> None:
    base = plan("qwen3-1.7b", "A100", "train.gradient_checkpointing=false").asked
    longer = plan("qwen3-1.7b", "A100", "train.pack_tokens=2048").asked
    checkpointed = plan("qwen3-1.7b", "A100", "train.gradient_checkpointing=true").asked
    larger = plan("qwen3-4b", "A100").asked
    assert base.device_bytes < longer.device_bytes
    assert base.time.total < longer.time.total
    assert checkpointed.device_bytes < base.device_bytes
    assert checkpointed.time.total > base.time.total
    assert larger.device_bytes > base.device_bytes
    assert larger.time.total > base.time.total


def test_packs_that_cannot_be_shared_out_are_said_and_put_right() -> None:
    found = plan("qwen3-0.6b", "1x8xH100", "train.packs_per_step=12")
    assert found.asked.problem is not None
    assert "train.packs_per_step=12" in str(found.asked.problem)
    assert found.chosen is not None
    assert found.chosen.packs_per_step % 8 == 0


def test_a_step_needs_as_many_rows_as_packs() -> None:
    recipe = load_recipe("guard", ["train.packs_per_step=8"])
    few = dataclasses.replace(WORK, rows=7)
    problem = as_asked(recipe, read_geometry("qwen3-0.6b"), few, parse_cluster("8xH100")).problem
    assert problem is not None
    assert problem.kind == "too few rows"


def test_an_engine_on_one_gpu_is_launched_not_trained_alone() -> None:
    found = plan("qwen3-8b", "1xRTX4090", "model.method=full", "train.packs_per_step=4")
    assert found.chosen is not None
    assert found.chosen.strategy in {"zero2_offload", "zero3_offload"}
    (command,) = commands(found, found.chosen, ["guard"])
    assert command.startswith("guardtrain launch guard")
    assert command.endswith("--nodes 1 --gpus-per-node 1")


def test_hours_are_those_of_whole_steps() -> None:
    found = plan("qwen3-0.6b", "1x8xH100", "train.packs_per_step=8")
    steps = WORK.steps(found.asked.setup.pack.budget, 8)
    assert hours(found, found.asked) == pytest.approx(steps * found.asked.time.total / 3600)
    assert steps * 8 * WORK.rows_of_pack(1024) >= 3 * WORK.rows
