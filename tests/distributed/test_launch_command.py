"""`guardtrain launch` on one machine: the run of `accelerate launch`, with the exit codes that launchers lose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import Launched, processes_of, rank_environment, steps_of

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(1800)]

GUARDTRAIN = Path(sys.executable).with_name("guardtrain")


@pytest.fixture
def start(tiny_recipe: list[str], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts `guardtrain launch`, from a folder that is not the repository, without its environment on the path."""
    started: list[subprocess.Popen[str]] = []

    def call(*overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
        recipe = [*tiny_recipe, f"output.dir={tmp_path / 'run'}", *overrides]
        command = [GUARDTRAIN, "launch", *recipe, "--gpus-per-node", str(ranks)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env={**rank_environment(), "PATH": os.environ["PATH"]}, **output))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:  # a test failed: its ranks would slow down all later ones
            process.terminate()
            process.wait(timeout=100)


@pytest.mark.parametrize("strategy", ["auto", "zero2"])
def test_it_is_the_run_of_accelerate_launch(
    strategy: str, start: Callable[..., Any], launch: Callable[..., Launched], tmp_path: Path
) -> None:
    process = start(f"distributed.strategy={strategy}")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert f"guard: {tmp_path}/run/model" in out.replace("\n", "")
    assert "Traceback" not in err
    expected = launch(tmp_path / "expected", "ddp" if strategy == "auto" else strategy)
    assert [record["loss"] for record in steps_of(tmp_path / "run")] == expected.curve("loss")


def test_a_stop_file_saves_and_says_so_and_auto_resume_goes_on(
    start: Callable[..., Any], launch: Callable[..., Launched], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("train.max_steps=60")
    wait_for_steps(run, 5, process)
    (run / "stop").touch()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    stopped_at = len(steps_of(run))
    assert 5 <= stopped_at < 60
    assert (run / "checkpoints" / f"checkpoint-{stopped_at}" / "manifest.json").is_file()
    resumed = start("train.max_steps=60", "--auto-resume")
    _, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    assert [record["loss"] for record in steps_of(run)] == launch(tmp_path / "e", "ddp", "train.max_steps=60").curve("loss")


@pytest.mark.parametrize(("number", "ranks", "code"), [(signal.SIGINT, 2, 130), (signal.SIGINT, 1, 130), (signal.SIGTERM, 1, 75)])
def test_told_to_stop_it_saves_on_all_ranks(
    number: signal.Signals, ranks: int, code: int, start: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("train.max_steps=4000", ranks=ranks)
    wait_for_steps(run, 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert (run / "checkpoints" / f"checkpoint-{len(steps_of(run))}" / "manifest.json").is_file()
    assert processes_of(run) == []


def test_bad_input_is_one_line_and_exit_code_2(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "label": "perhaps"}\n')
    process = start(f"data.train={tmp_path}/bad.jsonl")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert out == ""
    assert f"{tmp_path}/bad.jsonl:1" in err.replace("\n", "")
    assert err.count("Error: ") == 1, err
    assert "Traceback" not in err
    mistaken = start("train.packs_per_step=3")
    assert "train.packs_per_step" in mistaken.communicate(timeout=20)[1]
    assert mistaken.returncode == 2


def wait_for_steps(run: Path, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(steps_of(run)) < number:
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
