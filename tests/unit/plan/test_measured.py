"""The planner against what benchmarks/results/plan_cpu.json has measured: a change of a formula that makes it worse is seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from guardtrain.plan.geometry import geometry_of, read_geometry
from guardtrain.plan.hardware import Device

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RESULTS = json.loads((BENCHMARKS / "results" / "plan_cpu.json").read_text("utf-8"))
VOCABULARY = 49_152  # of the tokenizer that the random models were given


@pytest.fixture(scope="module")
def plan_cells() -> Any:
    """The benchmark's own cells and predictions."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import plan_cells
    finally:
        sys.path.remove(str(BENCHMARKS))
    return plan_cells


def test_there_are_enough_cells(plan_cells: Any) -> None:
    assert {each["cell"] for each in RESULTS["cells"]} == {cell.name for cell in plan_cells.CELLS}
    assert len(RESULTS["cells"]) >= 12


@pytest.mark.parametrize("measured", RESULTS["cells"], ids=lambda measured: measured["cell"])
def test_a_run_takes_the_memory_and_the_time_that_are_planned(measured: dict[str, Any], plan_cells: Any) -> None:
    (cell,) = [each for each in plan_cells.CELLS if each.name == measured["cell"]]
    tree = plan_cells.GEOMETRIES.get(cell.model)
    geometry = read_geometry(cell.model) if tree is None else geometry_of({**tree, "vocab_size": VOCABULARY}, name="x", where="x")
    predicted = plan_cells.prediction(cell, geometry, Device(**measured["device"]))
    assert predicted.peak.total == pytest.approx(measured["measured_bytes"], rel=0.1)
    assert predicted.time.total == pytest.approx(measured["measured_seconds"], rel=0.25)
