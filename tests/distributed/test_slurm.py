"""Runs under a real Slurm of two nodes: told to stop, put back into the queue, finished as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import Launched, rank_environment, ranks_of, steps_of
from slurm_cluster import Slurm

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(1800)]

LONG = "train.max_steps=60"
ENDLESS = ("train.max_steps=4000", "train.save_steps=4000")


@pytest.fixture(scope="module")
def uninterrupted(launch: Callable[..., Launched], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The steps of a ZeRO-3 run on two ranks that nobody disturbs."""
    launched = launch(tmp_path_factory.mktemp("uninterrupted") / "run", "zero3", LONG)
    assert launched.code == 0, launched.said[-4000:]
    return steps_of(launched.run)


@pytest.fixture
def submit(slurm: Slurm, tiny_recipe: list[str], tmp_path: Path) -> Callable[..., str]:
    """`submit("--array=1-3%1")` starts the long run under ZeRO-3 through `guardtrain launch` and returns the job's number."""

    def call(*options: str, overrides: tuple[str, ...] = ()) -> str:
        recipe = [*tiny_recipe, LONG, "distributed.strategy=zero3", f"output.dir={tmp_path}/run", *overrides]
        flags = ["--nodes", "2", "--slurm", *(f"--sbatch={option}" for option in options)]
        command = [Path(sys.executable).with_name("guardtrain"), "launch", *recipe, *flags]
        environment = {**slurm.environment, **rank_environment(), "SLURM_CONF": slurm.environment["SLURM_CONF"]}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return re.search(r"\d+", done.stdout)[0]

    return call


def logs(folder: Path) -> str:
    """What the job and its nodes said, for a test that fails."""
    return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in [*folder.glob("*.log"), *folder.glob("logs/*.log")])


def same_curve(run: Path, expected: list[dict[str, Any]]) -> None:
    """Every step once, in order, with the same loss and gradient norm to the last bit."""
    found = steps_of(run)
    keys = ("step", "loss", "grad_norm")
    assert [[record[key] for key in keys] for record in found] == [[record[key] for key in keys] for record in expected]


def test_a_signal_in_mid_run_requeues_the_job_and_no_step_is_lost_or_repeated(
    slurm: Slurm, submit: Callable[..., str], uninterrupted: list[dict[str, float]], tmp_path: Path
) -> None:
    job = submit("--time=60")
    slurm.wait("ten steps", lambda: len(steps_of(tmp_path / "run")) >= 10)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait("the job is put back", lambda: slurm.restarts(job) == 1)
    stopped_at = len(steps_of(tmp_path / "run"))
    assert 10 <= stopped_at < 60, "the signal came too late to test anything"
    slurm.wait("the end", lambda: slurm.states(job) == ["COMPLETED"])
    same_curve(tmp_path / "run", uninterrupted)
    assert (tmp_path / "run" / "model" / "guard.json").is_file(), logs(tmp_path)
    assert "resuming from" in (tmp_path / "run" / "train.log").read_text()
    ranks = sorted(str(path.relative_to(tmp_path / "logs")) for path in (tmp_path / "logs").rglob("stderr.log"))
    assert len({path.split("/")[1] for path in ranks}) == 2, f"a log of each rank: {ranks}"


def test_the_folder_of_a_plan_runs_as_a_job(slurm: Slurm, tiny_recipe: list[str], tmp_path: Path) -> None:
    recipe = [*tiny_recipe, "distributed.strategy=zero3", "train.max_steps=3", f"output.dir={tmp_path}/run"]
    environment = {**slurm.environment, **rank_environment(), "SLURM_CONF": slurm.environment["SLURM_CONF"]}
    program = Path(sys.executable).with_name("guardtrain")
    plan = [program, "plan", *recipe, "--cluster", "2x1xCPU", "--out", str(tmp_path / "plan")]
    subprocess.run(plan, env=environment, capture_output=True, check=True)
    submitted = subprocess.run([tmp_path / "plan" / "run.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = re.search(r"\d+", submitted.stdout)[0]
    slurm.wait("the end", lambda: slurm.states(job) == ["COMPLETED"] or "FAILED" in slurm.states(job))
    assert slurm.states(job) == ["COMPLETED"], logs(tmp_path)
    assert len(steps_of(tmp_path / "run")) == 3
    assert "2 ranks" in (tmp_path / "run" / "train.log").read_text()


def test_a_chain_of_jobs_where_requeueing_is_forbidden(
    slurm: Slurm, submit: Callable[..., str], uninterrupted: list[dict[str, float]], tmp_path: Path
) -> None:
    job = submit("--time=60", "--array=1-3%1", "--no-requeue")
    slurm.wait("ten steps", lambda: len(steps_of(tmp_path / "run")) >= 10)
    # 2026-11, Slurm 22.05: it signals a job of an array and exits with 229 all the same.
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{job}_1"], env=slurm.environment, check=False)
    slurm.wait("the second job ends", lambda: sorted(slurm.states(job)) == ["CANCELLED", "COMPLETED", "COMPLETED"])
    assert (tmp_path / f"guardtrain-{job}.log").read_text().count("preempted") == 1
    same_curve(tmp_path / "run", uninterrupted)


def test_a_job_that_is_preempted_saves_within_its_grace_time_and_comes_back(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    """Slurm sends SIGTERM to every process of the step: launchers must not kill the ranks that save."""
    job = submit("--time=60", overrides=ENDLESS)
    slurm.wait("three steps", lambda: len(steps_of(tmp_path / "run")) >= 3)
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    slurm.call(*urgent)
    slurm.wait("the job is put back", lambda: slurm.restarts(job) == 1)
    stopped_at = len(steps_of(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{stopped_at}" / "manifest.json").is_file(), logs(tmp_path)
    slurm.wait("it goes on", lambda: len(steps_of(tmp_path / "run")) > stopped_at)
    slurm.cancel_all()


def test_a_cancelled_job_saves_and_stays_away(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit("--time=60", overrides=ENDLESS)
    slurm.wait("three steps", lambda: len(steps_of(tmp_path / "run")) >= 3)
    slurm.call("scancel", job)
    slurm.wait("the job ends", lambda: slurm.states(job) == ["CANCELLED"] and not slurm.call("squeue", "-h"))
    time.sleep(10)  # the time after which a requeued job may start
    assert slurm.states(job) == ["CANCELLED"]
    assert slurm.restarts(job) == 0
    assert ranks_of(tmp_path / "run") == []


def test_a_stop_file_in_the_run_folder_ends_the_job_for_good(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit("--time=60", "--array=1-3%1", "--no-requeue", overrides=ENDLESS)
    slurm.wait("three steps", lambda: len(steps_of(tmp_path / "run")) >= 3)
    (tmp_path / "run" / "stop").touch()
    slurm.wait("the chain ends", lambda: sorted(set(slurm.states(job))) == ["CANCELLED", "COMPLETED"])
    stopped_at = len(steps_of(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{stopped_at}" / "manifest.json").is_file()


def test_the_end_of_the_jobs_time_stops_the_run_without_any_signal(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    """A job of two minutes: the ranks save and the job is put back before Slurm would kill it."""
    job = submit("--time=2", overrides=ENDLESS)
    slurm.wait("the job is put back", lambda: slurm.restarts(job) == 1)
    slurm.cancel_all()
    assert re.search(r"stopped at step \d+ of 4000 \(the job ends in \d+ s\)", (tmp_path / "run" / "train.log").read_text())


def test_one_rank_that_dies_ends_all_of_them_within_a_minute(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit("--time=60", "--no-requeue", overrides=ENDLESS)
    slurm.wait("three steps", lambda: len(steps_of(tmp_path / "run")) >= 3)
    ranks = ranks_of(tmp_path / "run")
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    start = time.monotonic()
    slurm.wait("the job fails", lambda: slurm.states(job) == ["FAILED"], 90)
    assert time.monotonic() - start < 60
    assert ranks_of(tmp_path / "run") == []
