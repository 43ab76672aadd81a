"""Resuming on several ranks: from damaged folders, and on another number of ranks than the checkpoint was written by."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import METHODS, STEPS, TOLERANCE, Launched
from safetensors.torch import load_file

from guardtrain.plan.host import checkpoint_bytes

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(1800)]

HALF = STEPS // 2
SAVING = [f"train.save_steps={HALF}"]


@pytest.fixture(scope="module")
def written(launch: Callable[..., Launched], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int], Launched]:
    """`written("zero3", "full", 2)`: a finished run with a checkpoint at half time and one at the end, made once."""
    runs: dict[tuple[str, str, int], Launched] = {}

    def call(config: str, method: str, processes: int) -> Launched:
        key = (config, method, processes)
        if key not in runs:
            folder = tmp_path_factory.mktemp(f"{config}-{method}-{processes}") / "run"
            runs[key] = launch(folder, config, *METHODS[method], *SAVING, processes=processes)
            assert runs[key].code == 0, runs[key].said[-4000:]
        return runs[key]

    return call


CHANGES = [
    ("zero3", "full", 2, 1),
    ("zero3", "full", 2, 4),
    ("zero3", "full", 1, 2),
    ("zero3", "lora", 2, 1),
    ("zero2", "full", 1, 2),
    ("zero1", "lora", 2, 4),
    ("ddp", "full", 2, 4),
]


@pytest.mark.parametrize(("config", "method", "before", "after"), CHANGES)
def test_another_number_of_ranks_goes_on_alike(
    config: str,
    method: str,
    before: int,
    after: int,
    written: Callable[..., Launched],
    launch: Callable[..., Launched],
    tmp_path: Path,
) -> None:
    expected = written(config, method, before)
    run = copy_without_last_checkpoint(expected.run, tmp_path / "run")
    resumed = launch(run, config, *METHODS[method], *SAVING, "--resume", processes=after)
    for key in ("step", "loss", "grad_norm"):
        assert resumed.curve(key) == pytest.approx(expected.curve(key), rel=TOLERANCE), key
    assert ("of another number of ranks: converted" in resumed.said.replace("\n", "")) == (config != "ddp")
    assert not list((run / "checkpoints").glob("tmp-*"))


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_a_checkpoint_is_as_large_as_preflight_predicts(config: str, written: Callable[..., Launched]) -> None:
    run = written(config, "full", 2).run
    files = (run / "checkpoints" / f"checkpoint-{STEPS}").rglob("*")
    # Beside the numbers there are the tokenizer (3.5 MB) and a few states.
    size = sum(file.stat().st_size for file in files if file.is_file() and file.name != "tokenizer.json")
    total = sum(value.numel() for value in load_file(run / "model" / "model.safetensors").values())
    stage = None if config == "ddp" else int(config[-1])
    predicted = checkpoint_bytes(total, total, is_adapter=False, compute_bytes=4, zero_stage=stage)
    assert size == pytest.approx(predicted, rel=0.02)


def flip_a_byte(checkpoint: Path) -> str:
    file = checkpoint / f"global_step{STEPS}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"{file.relative_to(checkpoint)} was changed"


def lose_a_file_of_a_rank(checkpoint: Path) -> str:
    file = checkpoint / f"global_step{STEPS}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.unlink()
    return f"{file.relative_to(checkpoint)} is missing"


def cut_a_file(checkpoint: Path) -> str:
    file = checkpoint / f"global_step{STEPS}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return f"{file.relative_to(checkpoint)} has {len(content) // 2} bytes, expected {len(content)}"


def lose_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "it was never finished"


@pytest.mark.parametrize("damage", [flip_a_byte, lose_a_file_of_a_rank, cut_a_file, lose_the_manifest])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    damage: Callable[[Path], str], written: Callable[..., Launched], launch: Callable[..., Launched], tmp_path: Path
) -> None:
    expected = written("zero2", "full", 2)
    run = tmp_path / "run"
    shutil.copytree(expected.run, run)
    problem = damage(run / "checkpoints" / f"checkpoint-{STEPS}")
    resumed = launch(run, "zero2", *METHODS["full"], *SAVING, "--resume")
    said = "".join((run / "train.log").read_text().splitlines())
    assert f"checkpoint-{STEPS} is not used: " in said
    assert problem in said
    assert f"resuming from {run}/checkpoints/checkpoint-{HALF}" in said
    for key in ("step", "loss"):
        assert resumed.curve(key) == expected.curve(key)


def test_nothing_but_damage_is_an_error_that_names_all(
    written: Callable[..., Launched], launch: Callable[..., Launched], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(written("zero2", "full", 2).run, run)
    for step in (HALF, STEPS):
        lose_the_manifest(run / "checkpoints" / f"checkpoint-{step}")
    resumed = launch(run, "zero2", *METHODS["full"], *SAVING, "--resume")
    assert resumed.code != 0
    said = resumed.said.replace("\n", "")
    assert said.count("CheckpointError") == 1, "one rank speaks for all"
    assert f"checkpoint-{HALF}: " in said
    assert f"checkpoint-{STEPS}: " in said


def copy_without_last_checkpoint(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints" / f"checkpoint-{STEPS}")
    return target
