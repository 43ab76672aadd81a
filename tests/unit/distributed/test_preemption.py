"""What asks a run to stop, in a world of one rank; several ranks are tested by real launches."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guardtrain.distributed.preemption import StopReason, StopRequests, requests_of_the_job, tell_the_job


@pytest.fixture
def requests(tmp_path: Path) -> Iterator[StopRequests]:
    requests = StopRequests(tmp_path / "stop")
    requests.listen()
    yield requests
    requests.stop_listening()


def test_nothing_asks(requests: StopRequests) -> None:
    assert requests.agreed_reason() is None


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGINT, StopReason("Ctrl-C", "interrupted")),
        (signal.SIGTERM, StopReason("SIGTERM", "preempted")),
        (signal.SIGUSR1, StopReason("SIGUSR1", "preempted")),
    ],
)
def test_signals_ask(requests: StopRequests, number: signal.Signals, reason: StopReason) -> None:
    os.kill(os.getpid(), number)
    assert requests.agreed_reason() == reason


def test_a_second_ctrl_c_ends_at_once(requests: StopRequests) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    requests = StopRequests(tmp_path / "stop")
    requests.listen()
    assert signal.getsignal(signal.SIGTERM) != before
    requests.stop_listening()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_file_asks(requests: StopRequests) -> None:
    requests.stop_file.touch()
    assert requests.agreed_reason() == StopReason(f"stop file {requests.stop_file}", "stopped")


def test_the_jobs_stop_file_asks_even_if_it_was_there_first(tmp_path: Path) -> None:
    """The job may have been told while the model was loaded; its script has removed what an earlier one left."""
    (tmp_path / "job.stop").touch()
    requests = StopRequests(tmp_path / "stop", tmp_path / "job.stop")
    requests.listen()
    requests.stop_listening()
    assert requests.agreed_reason() == StopReason(f"stop file {tmp_path / 'job.stop'}", "preempted")


def test_the_end_of_the_job_asks_in_time(tmp_path: Path) -> None:
    soon, later = time.time() + 100, time.time() + 1000
    assert StopRequests(tmp_path / "stop", deadline=later).agreed_reason() is None
    reason = StopRequests(tmp_path / "stop", deadline=soon).agreed_reason()
    assert reason is not None
    assert reason.text.startswith("the job ends in ")


def test_a_short_job_still_works_for_half_of_its_time(tmp_path: Path) -> None:
    requests = StopRequests(tmp_path / "stop", deadline=time.time() + 100)
    requests.listen()
    requests.stop_listening()
    assert requests.margin_seconds == pytest.approx(50, abs=1)
    assert requests.agreed_reason() is None


def test_an_earlier_runs_stop_file_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    requests = StopRequests(tmp_path / "stop")
    requests.listen()
    requests.stop_listening()
    assert requests.agreed_reason() is None


def test_what_the_job_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GUARDTRAIN_STOP_FILE", "GUARDTRAIN_DEADLINE", "SLURM_JOB_END_TIME", "GUARDTRAIN_STATUS_FILE"):
        monkeypatch.delenv(name, raising=False)
    alone = requests_of_the_job(tmp_path, 60)
    assert (alone.stop_file, alone.job_stop_file, alone.deadline) == (tmp_path / "stop", None, None)
    tell_the_job("done")
    monkeypatch.setenv("GUARDTRAIN_STOP_FILE", str(tmp_path / "other"))
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    monkeypatch.setenv("GUARDTRAIN_STATUS_FILE", str(tmp_path / "status"))
    in_slurm = requests_of_the_job(tmp_path, 60)
    assert (in_slurm.stop_file, in_slurm.job_stop_file) == (tmp_path / "stop", tmp_path / "other")
    assert (in_slurm.deadline, in_slurm.margin_seconds) == (1.7e9, 60)
    tell_the_job("preempted")
    assert (tmp_path / "status").read_text() == "preempted\n"
