"""The same training on any number of ranks and under every ZeRO stage: loss and gradient norm of twenty steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import METHODS, STEPS, TOLERANCE, Launched
from safetensors.torch import load_file

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(1800)]

Launch = Callable[..., Launched]
HALF_TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def alone(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Launched]:
    """`alone("lora")`: one rank, all packs of a step one after the other; each kind of run once."""
    runs: dict[tuple[str, ...], Launched] = {}

    def call(*overrides: str) -> Launched:
        if overrides not in runs:
            runs[overrides] = launch(tmp_path_factory.mktemp("alone") / "run", "cpu", *overrides, processes=1)
        return runs[overrides]

    return call


# One rank accumulates four packs, two ranks two each, four ranks one each.
SHAPES = [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3_offload", 2)]
MATRIX = [(*shape, method) for shape in SHAPES for method in ("full", "lora")]
MATRIX += [(*shape, "full") for shape in (("ddp", 4), ("zero3", 4), ("zero2_offload", 2))]
MATRIX += [(*shape, "qlora") for shape in (("ddp", 2), ("zero2", 2), ("zero3", 2))]


@pytest.mark.parametrize(("config", "processes", "method"), MATRIX)
def test_ranks_train_as_one(
    config: str, processes: int, method: str, alone: Callable[..., Launched], launch: Launch, tmp_path: Path
) -> None:
    together = launch(tmp_path / "run", config, *METHODS[method], processes=processes)
    expected = alone(*METHODS[method])
    assert difference(together, expected, STEPS) < TOLERANCE
    assert weights_of(together) == pytest.approx(weights_of(expected), rel=1e-4)


MANY_CHUNKS = ["data.train=starter", "data.max_rows=400", "train.pack_tokens=8192", "train.packs_per_step=2", "train.max_steps=3"]
MANY_CHUNKS += ["task.max_reason_tokens=64", "evaluate.max_rows=20"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_packs_whose_loss_comes_in_several_chunks(
    config: str, tied: bool, alone: Callable[..., Launched], launch: Launch, qwen3_untied_folder: str, tmp_path: Path
) -> None:
    """The output layer is asked several times within a step, by the loss and, where it is tied, by the embedding."""
    overrides = [*MANY_CHUNKS, *([] if tied else [f"model.name={qwen3_untied_folder}"])]
    assert difference(launch(tmp_path / "run", config, *overrides), alone(*overrides), 3) < TOLERANCE


def test_the_collapse_watch_scores_with_split_weights(launch: Launch, alone: Callable[..., Launched], tmp_path: Path) -> None:
    watching = ["train.watch_steps=10", "train.watch_rows=8"]
    split, whole = launch(tmp_path / "run", "zero3", *watching), alone(*watching)
    assert difference(split, whole, STEPS) < TOLERANCE
    seen = [watched(each.run) for each in (split, whole)]
    assert [record["step"] for record in seen[0]] == [10, 20]
    for key in ("watch_flagged", "watch_auroc", "watch_gap"):
        assert [record[key] for record in seen[0]] == pytest.approx([record[key] for record in seen[1]], abs=1e-3)


def test_half_precision_trains_alike_under_all_stages(launch: Launch, tmp_path: Path) -> None:
    """DeepSpeed has another optimizer class for bfloat16 under each stage. Their sums differ in order, so only roughly alike."""
    curves = {
        config: launch(tmp_path / config, config, "model.dtype=bfloat16").curve("loss") for config in ("zero1", "zero2", "zero3")
    }
    for config in ("zero2", "zero3"):
        assert curves[config] == pytest.approx(curves["zero1"], rel=HALF_TOLERANCE), config
    assert curves["zero1"][-1] < 0.95 * curves["zero1"][0], "it learns"


def difference(together: Launched, alone: Launched, steps: int) -> float:
    """The largest relative difference in loss or gradient norm of any step."""
    pairs = [pair for key in ("loss", "grad_norm") for pair in zip(alone.curve(key), together.curve(key), strict=True)]
    assert len(pairs) == 2 * steps
    return max(abs(found - expected) / expected for expected, found in pairs)


def watched(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "watch_gap" in record]


def weights_of(launched: Launched) -> dict[str, float]:
    """The norm of every saved weight."""
    (file,) = (launched.run / "model").glob("*.safetensors")
    return {name: float(value.double().norm()) for name, value in load_file(file).items()}
