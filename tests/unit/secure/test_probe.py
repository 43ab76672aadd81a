"""What a probe's figures see of a disturbance, on points whose place is known."""

from __future__ import annotations

import numpy as np
import pytest

from guardtrain.secure.probe import Probe, ProbeFigures

PROBE = Probe(np.zeros(1), np.ones(1), np.ones(1), 0.0)
PLACES_N = np.array([-2.0, -1.0, -0.5, 0.25, -0.25, 0.5, 1.0, 2.0])
IS_MALICIOUS_N = np.arange(8) >= 4


def figures_of(now_N: np.ndarray) -> ProbeFigures:
    return PROBE.figures(now_N[:, None].astype(np.float32), IS_MALICIOUS_N, PLACES_N)


def test_where_nothing_moved_it_is_auroc() -> None:
    figures = figures_of(PLACES_N)
    assert figures.kept_auroc == figures.auroc == pytest.approx(15 / 16)
    assert figures.balanced_accuracy == pytest.approx(0.75)


@pytest.mark.parametrize("shift", [-1.1, 1.1])
def test_a_move_of_all_prompts_to_one_side_is_a_loss_that_auroc_does_not_see(shift: float) -> None:
    figures = figures_of(PLACES_N + shift)
    assert figures.auroc == pytest.approx(15 / 16)
    assert figures.kept_auroc < 0.8


def test_a_line_that_is_lost_is_chance_and_a_reversed_one_is_worse() -> None:
    assert figures_of(np.zeros(8)).kept_auroc == 0.5
    assert figures_of(-PLACES_N).kept_auroc == pytest.approx(1 / 16)


def test_a_model_that_overflows_has_figures() -> None:
    assert 0 <= figures_of(np.full(8, np.nan)).kept_auroc <= 1
