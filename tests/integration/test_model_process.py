"""The model in a process of its own: what happens to it happens to nobody else, and no fault lets a text pass."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_guards import TEXTS, guard_of, load_tiny, write_tiny

from guardtrain.errors import ModelError
from guardtrain.inference.guards import LoadedGuard
from guardtrain.serve import Failure, Guard, Status, Verdict
from guardtrain.serve.options import GuardOptions
from guardtrain.serve.process import ProcessBackend

WAIT_SECONDS = 300.0  # a process imports for minutes where the machine has much else to do
LONG = "Water the plants, all of them. " * 40  # some two hundred tokens, of which a reason makes more work


@pytest.fixture(scope="module")
def loaded(smol_tokenizer: Any) -> LoadedGuard:
    return load_tiny(smol_tokenizer)


@pytest.fixture(scope="module")
def folder(loaded: LoadedGuard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(loaded, tmp_path_factory.mktemp("guards") / "tiny")


@pytest.fixture(scope="module")
def guard(folder: Path) -> Iterator[Guard]:
    with Guard.load(folder, backend="process", options=GuardOptions(hang_seconds=3.0, threads=1)) as guard:
        yield guard


def process_id(guard: Guard) -> int:
    backend = guard._backend
    assert isinstance(backend, ProcessBackend)
    assert backend.process_id is not None
    return backend.process_id


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_verdicts_are_those_of_this_process(guard: Guard, loaded: LoadedGuard) -> None:
    with guard_of(loaded) as local:
        for mode in local.modes:
            expected = local.check_many([*TEXTS, LONG], mode=mode)
            for found, own in zip(guard.check_many([*TEXTS, LONG], mode=mode), expected, strict=True):
                assert (found.decision, found.reason, found.escalated) == (own.decision, own.reason, own.escalated)
                assert found.score == pytest.approx(own.score, abs=1e-4)
        assert (guard.modes, guard.threshold_version, guard.mode) == (local.modes, local.threshold_version, "cascade")


def test_a_process_that_is_killed_fails_what_it_had_and_is_started_again(guard: Guard) -> None:
    """In flight: no verdict, which blocks. Meanwhile: at once no verdict. Then: verdicts as before, without anybody's help."""
    known = guard.check(TEXTS[0], mode="on")
    pid, before = process_id(guard), guard.restarts

    async def ask() -> tuple[list[Verdict], list[Verdict]]:
        os.kill(pid, signal.SIGSTOP)  # so that it has answered nothing when it dies
        tasks = [asyncio.create_task(guard.acheck(f"{text} Again.", mode="on")) for text in TEXTS]
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        in_flight = await asyncio.gather(*tasks)
        assert not guard.is_ready
        return list(in_flight), [await guard.acheck("And one more.", mode="off")]

    in_flight, meanwhile = asyncio.run(ask())
    for verdict in [*in_flight, *meanwhile]:
        assert (verdict.decision, verdict.status, verdict.failure) == (None, Status.ERROR, Failure.MODEL)
        assert verdict.blocks()
    until(lambda: guard.is_ready)
    assert (guard.restarts, guard.queue_depth) == (before + 1, 0)
    assert process_id(guard) != pid
    fresh = guard.check(f"{TEXTS[0]} Again.", mode="on")
    assert fresh.decision is not None, "a failure is not remembered"
    assert guard.check(TEXTS[0], mode="on").score == known.score


def test_a_process_that_hangs_is_ended_and_those_who_wait_are_told(guard: Guard) -> None:
    until(lambda: guard.is_ready)
    pid, before = process_id(guard), guard.restarts
    os.kill(pid, signal.SIGSTOP)
    impatient = guard.check("Not for long.", mode="off", timeout_seconds=0.2)
    patient = guard.check("As long as it takes.", mode="off", timeout_seconds=WAIT_SECONDS)
    assert (impatient.failure, impatient.status) == (Failure.TIMEOUT, Status.TIMEOUT)
    assert patient.failure is Failure.MODEL
    assert patient.blocks()
    assert patient.latency_ms < 1000 * WAIT_SECONDS / 2
    until(lambda: guard.is_ready)
    assert guard.restarts == before + 1
    assert not is_alive(pid)


def test_signals_for_the_group_are_the_servers_business(guard: Guard) -> None:
    until(lambda: guard.is_ready)
    pid = process_id(guard)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert guard.check("Still there?", mode="off").decision is not None
    assert process_id(guard) == pid


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, folder: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("guard.json", "config.json"):
        (broken / name).write_text((folder / name).read_text())
    with pytest.raises(ModelError, match="cannot be loaded") as raised:
        Guard.load(broken, backend="process").check("x")
    assert "\n" not in str(raised.value)


def test_the_process_ends_with_its_parent(folder: Path) -> None:
    """Also where the parent is killed and closes nothing itself."""
    code = (
        "import sys, time; from guardtrain.serve import Guard\n"
        f"guard = Guard.load({str(folder)!r}, backend='process'); guard.__enter__()\n"
        "print(guard._backend.process_id, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    until(lambda: not is_alive(pid))
