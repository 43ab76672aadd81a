"""What is said of ranks that do not answer. With several ranks: tests/distributed/test_failures.py."""

from __future__ import annotations

import json
import time

import pytest

from guardtrain.distributed.whereabouts import Whereabouts, _line, _within, failed_collective


def test_one_process_has_nobody_to_tell() -> None:
    whereabouts = Whereabouts(timeout_seconds=100)
    whereabouts.at("step 3")
    assert (whereabouts.what, whereabouts.report()) == ("step 3", [])
    whereabouts.close()


def test_what_a_rank_wrote_becomes_a_line() -> None:
    place = {"host": "n7", "what": "step 12, pack 40", "since": time.time() - 61}
    assert _line(3, json.dumps(place).encode()) == "rank 3 on n7: step 12, pack 40 since 61 s"
    assert _line(4, None) == "rank 4 has not begun"


def test_a_store_that_hangs_or_breaks_does_not_hold_the_report_up() -> None:
    start = time.monotonic()
    assert _within(0.2, lambda: time.sleep(5) or ["late"], ["no answer"]) == ["no answer"]
    assert time.monotonic() - start < 3

    def breaks() -> list[str]:
        raise RuntimeError("connection reset")

    assert _within(5, breaks, ["no answer"]) == ["no answer"]
    assert _within(5, lambda: ["answer"], ["no answer"]) == ["answer"]


@pytest.mark.parametrize(
    ("text", "is_collective"),
    [
        ("[../gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.2]:3", True),
        ("NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_errors_of_collectives_are_told_from_others(text: str, is_collective: bool) -> None:
    error = failed_collective(RuntimeError(f"{text}\nmore lines"), Whereabouts(10))
    assert (error is not None) == is_collective
    if error is not None:
        assert str(error).startswith("rank 0: another rank does not answer, found ")
        assert "more lines" not in str(error)
