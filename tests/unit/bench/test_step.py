"""What the contenders train on, and how they are compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from guardtrain.bench import contenders
from guardtrain.bench.contenders import FixedPacks, Record
from guardtrain.bench.step import StepOptions, check_options, compare, figures, gradient_error
from guardtrain.bench.work import Work, build_work, policy_of_length, stratified
from guardtrain.data.packing import Pack, Segment
from guardtrain.errors import ConfigError, GuardtrainError
from guardtrain.model.attention.tree import visible
from guardtrain.overrides import build_recipe


def test_samples_are_the_copies_behind_the_policy_with_labels() -> None:
    work = Work([], [Segment([10, 20, 21], [0.0, 0.0, 1.0]), Segment([10, 30, 31], [0.0, 1.0, 1.0])], [1, 2])
    assert work.samples() == [
        {"input_ids": [1, 2, 10, 20, 21], "labels": [-100, -100, -100, -100, 21]},
        {"input_ids": [1, 2, 10, 30, 31], "labels": [-100, -100, -100, 30, 31]},
    ]


@pytest.mark.parametrize("modes", ["[off, on]", "[off]", "[on]"])
def test_peers_get_the_same_predictions(modes: str, rows_file: str, smol_tokenizer: Any) -> None:
    """What our packs predict after which tokens is what the samples' labels say, however trees share tokens."""
    recipe = recipe_of(rows_file, f"task.modes={modes}")
    work = build_work(recipe, smol_tokenizer, num_rows=8, policy_tokens=75)
    packs = FixedPacks(work, budget=600, seed=1)
    ours = Counter(prediction for index in range(len(packs)) for prediction in predictions(packs[index]))
    assert ours == Counter(
        (tuple(sample["input_ids"][:place]), label, 1.0)
        for sample in work.samples()
        for place, label in enumerate(sample["labels"])
        if label >= 0
    )


def predictions(pack: Pack) -> Iterator[tuple[tuple[int, ...], int, float]]:
    """(tokens before it, token, weight) of every prediction."""
    everything = np.arange(len(pack))
    for source, target, weight in zip(pack.sources_N, pack.targets_N.tolist(), pack.weights_N.tolist(), strict=True):
        yield tuple(pack.input_ids_T[visible(pack, np.array([source]), everything)[0]].tolist()), target, weight


def test_a_sample_of_rows_holds_short_and_long_ones_in_their_shares() -> None:
    lengths = [10] * 50 + [100] * 25 + [1000] * 25
    random.Random(0).shuffle(lengths)
    for seed in range(20):
        chosen = stratified(lengths, 8, seed)
        assert sorted(lengths[row] for row in chosen) == [10] * 4 + [100] * 2 + [1000] * 2
        assert len(set(chosen)) == 8
    assert stratified(lengths, 8, 1) == stratified(lengths, 8, 1) != stratified(lengths, 8, 2)
    assert sorted(stratified(lengths, 100, 1)) == list(range(100))


def recipe_of(rows_file: str, *overrides: str) -> Any:
    return build_recipe({"data": {"train": [rows_file]}}, list(overrides), name="bench", where="bench")


@pytest.mark.parametrize("policy_tokens", [0, 40, 75, 300])
def test_a_policy_of_any_length(policy_tokens: int, rows_file: str, smol_tokenizer: Any) -> None:
    work = build_work(recipe_of(rows_file), smol_tokenizer, num_rows=8, policy_tokens=policy_tokens)
    assert abs(len(work.root_ids) - policy_tokens) <= 3  # what is cut is encoded anew
    assert len(work.rows) == 8
    assert all(len(row.children) == 2 for row in work.rows)
    assert {weight for row in work.rows for child in row.children for weight in child.weights} == {0.0, 1.0}


def test_the_recipes_own_policy_and_a_seeded_sample(rows_file: str, smol_tokenizer: Any) -> None:
    works = [build_work(recipe_of(rows_file), smol_tokenizer, num_rows=8, policy_tokens=None) for _ in range(2)]
    other = build_work(recipe_of(rows_file, "train.seed=3"), smol_tokenizer, num_rows=8, policy_tokens=None)
    assert works[0] == works[1] != other
    assert len(works[0].root_ids) > 60


def test_what_cannot_be_measured_is_refused(rows_file: str, smol_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--rows: too few rows for this benchmark, expected at most 35, found 99"):
        build_work(recipe_of(rows_file), smol_tokenizer, num_rows=99, policy_tokens=None)
    with pytest.raises(ConfigError, match=r"--policy-tokens: the template alone is longer"):
        policy_of_length(smol_tokenizer, "Judge.", 3)
    with pytest.raises(ConfigError, match=r"--contenders: no such contender, expected guardtrain, .*, found trll"):
        check_options(StepOptions(contenders=("guardtrain", "trll")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--peer-liger: not installed, found liger-kernel"):
        check_options(StepOptions(peer_liger=True, contenders=("trainer",)))
    with pytest.raises(ConfigError, match="--contenders: not installed, found trl"):
        check_options(StepOptions())
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="--steps: the first step only warms up"):
        check_options(StepOptions(steps=1))


def test_the_same_packs_hold_every_row_in_every_epoch() -> None:
    rows = [Segment([0, 1, 2], [0.0, 0.0, 1.0]) for _ in range(20)]
    packs = FixedPacks(Work(rows, [], [5] * 4), budget=14, seed=1)
    assert len(packs) == 4
    assert sum(len(packs[index].targets_N) for index in range(4)) == 20
    assert [len(packs[index]) for index in range(4)] == [14] * 4


def test_the_clock_counts_all_but_the_writing_of_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collating before a step counts; two steps are asked for, and at least 25 seconds."""
    times = iter([0.0, 8.0, 9.0, 10.0, 24.0, 30.0])  # begin, gradient written from 8 to 9, three ends of steps
    monkeypatch.setattr(contenders, "_now", lambda: next(times))
    record, control = Record({}), SimpleNamespace(should_training_stop=None)
    clock = contenders._Clock(record, SimpleNamespace(gradient_file=tmp_path / "g.pt", steps=2, min_seconds=25))
    clock.on_train_begin(None, None, control)
    stops = []
    for step in range(3):
        clock.on_step_begin(None, None, control)
        clock.on_pre_optimizer_step(None, SimpleNamespace(global_step=step), control, model=torch.nn.Linear(1, 1))
        clock.on_step_end(None, None, control)
        stops.append(control.should_training_stop)
    assert record.seconds == [9.0, 14.0, 6.0]
    assert stops == [False, False, True]


def test_figures_of_all_steps_but_the_first() -> None:
    record = Record({}, seconds=[9.0, 5.0, 3.0], losses=[3.0, 2.0, 1.0], tokens=300)
    found = figures(record, rows=8)
    assert (found["step_seconds"], found["rows_per_second"], found["computed_tokens_per_second"]) == (4.0, 2.0, 25.0)


def test_gradient_error_is_relative_over_all_parameters() -> None:
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert gradient_error(expected, expected) == 0
    assert gradient_error({"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])}, expected) == pytest.approx(0.1)
    with pytest.raises(GuardtrainError, match="different parameters, found b"):
        gradient_error({"a": expected["a"]}, expected)


def test_the_best_peer_is_what_we_are_compared_with(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1.0])}, tmp_path / "gradient.pt")
    figures_of = {
        # Quick, so it did another step.
        "guardtrain": {"rows_per_second": 6.0, "losses": [2.0, 1.0, 0.5], "step_seconds": 1.0, "all_step_seconds": [2, 1, 1]},
        "trl-packed": {"rows_per_second": 3.0, "losses": [2.0, 1.1], "step_seconds": 2.0, "all_step_seconds": [3, 2]},
        "trainer, 4 a batch": {"rows_per_second": 2.0, "losses": [2.0, 1.0], "step_seconds": 3.0, "all_step_seconds": [1.5, 3]},
    }
    results: dict[str, Any] = {"contenders": figures_of}
    compare(results, dict.fromkeys(figures_of, tmp_path / "gradient.pt"))
    assert (results["best_peer"], results["speedup_over_best_peer"]) == ("trl-packed", 2.0)
    assert results["speedup_over_fastest_peer_step"] == 1.5
    assert figures_of["trl-packed"]["loss_error_against_trainer"] == pytest.approx(0.1)
    assert figures_of["guardtrain"]["loss_error_against_trainer"] == 0
