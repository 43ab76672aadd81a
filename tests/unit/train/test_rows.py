"""Which rows of a run train which modes."""

from __future__ import annotations

import pytest

from guardtrain.config import TaskConfig
from guardtrain.train.rows import modes_of
from guardtrain.types import GuardExample, Label, Turn


def pairs(count: int) -> list[tuple[GuardExample, GuardExample]]:
    """Twins of a name, with prompts of their own."""

    def row(number: int, label: Label) -> GuardExample:
        prompt = (Turn("user", f"{label} prompt {number}"),)
        return GuardExample(prompt=prompt, label=label, reason="It asks.", id=f"{number}{label}", pair=f"pair {number}")

    return [(row(number, Label.MALICIOUS), row(number, Label.BENIGN)) for number in range(count)]


def test_every_row_trains_both_modes_by_default() -> None:
    assert {modes_of(row, TaskConfig(), seed=1) for twins in pairs(50) for row in twins} == {("off", "on")}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_pairs_writes_reasons_and_twins_agree(share: float) -> None:
    task = TaskConfig(on_share=share)
    drawn = [[modes_of(row, task, seed=1) for row in twins] for twins in pairs(1000)]
    assert all(one == other for one, other in drawn)
    assert {one for one, _ in drawn} == {("off",), ("off", "on")}
    # Four standard deviations of a binomial draw.
    assert sum(one == ("off", "on") for one, _ in drawn) / 1000 == pytest.approx(
        share, abs=4 * (share * (1 - share) / 1000) ** 0.5
    )


def test_another_seed_draws_other_pairs_and_a_larger_share_adds_to_a_smaller_one() -> None:
    def drawn(share: float, seed: int) -> set[str]:
        task = TaskConfig(on_share=share)
        return {twins[0].pair for twins in pairs(200) if "on" in modes_of(twins[0], task, seed)}

    assert drawn(0.5, seed=1) != drawn(0.5, seed=2)
    assert drawn(0.2, seed=1) < drawn(0.6, seed=1)
