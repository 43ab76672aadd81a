"""The same training on any number of ranks and under every ZeRO stage: loss and gradient norm of twenty steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from launching import METHODS, STEPS, TOLERANCE, Launched
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def alone(launch: Callable[..., Launched], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launched]:
    """One rank, four packs one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    return {method: launch(folder / method, "cpu", *METHODS[method], processes=1) for method in METHODS}


SHAPES = [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3_offload", 2), ("ddp", 4), ("zero3", 4)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("config", "processes"), SHAPES)
def test_ranks_train_as_one(
    config: str, processes: int, method: str, alone: dict[str, Launched], launch: Callable[..., Launched], tmp_path: Path
) -> None:
    together = launch(tmp_path / "run", config, *METHODS[method], processes=processes)
    for key in ("loss", "grad_norm"):
        expected, found = alone[method].curve(key), together.curve(key)
        assert len(expected) == len(found) == STEPS
        assert found == pytest.approx(expected, rel=TOLERANCE), key
    assert weights_of(together) == pytest.approx(weights_of(alone[method]), rel=1e-4)


def weights_of(launched: Launched) -> dict[str, float]:
    """The norm of every saved weight."""
    (file,) = (launched.run / "model").glob("*.safetensors")
    return {name: float(value.double().norm()) for name, value in load_file(file).items()}
