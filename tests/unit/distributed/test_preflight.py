"""What is said of clusters that we do not have: judged from made-up facts; real ones are collected in a world of one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from guardtrain.distributed.preflight import Facts, Finding, collect, exclude_line, judge

GOOD = Facts(
    rank=0,
    host="n0",
    devices=("H100",) * 8,
    versions={"torch": "2.13.0"},
    sees_shared=True,
    free_bytes=2**40,
    free_inodes=10**6,
    clock=1000.0,
    memlock_bytes=-1,
    reduce_gib_per_second=90.0,
)


def cluster(**odd: object) -> list[Facts]:
    """Four nodes of two ranks; the ranks of n2 differ."""
    nodes = [dataclasses.replace(GOOD, host=f"n{rank // 2}", rank=rank) for rank in range(8)]
    return [dataclasses.replace(each, **odd) if each.host == "n2" else each for each in nodes]


def judged(facts: list[Facts], checkpoint_bytes: int = 2**30, copies: int = 1, pinned_bytes: int = 0) -> list[Finding]:
    return list(judge(facts, checkpoint_bytes=checkpoint_bytes, copies=copies, pinned_bytes=pinned_bytes))


def test_nodes_that_are_alike() -> None:
    assert judged(cluster()) == []


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"devices": ("H100",) * 7}, "devices differ"),
        ({"versions": {"torch": "2.12.0"}}, "versions differ: {'torch': '2.12.0'}, elsewhere {'torch': '2.13.0'}"),
        ({"sees_shared": False}, "the run folder is not the one"),
    ],
)
def test_a_bad_node_is_named_once_and_excluded(odd: dict[str, object], said: str) -> None:
    (finding,) = judged(cluster(**odd))
    assert finding.host == "n2"
    assert said in finding.what
    assert exclude_line([finding]) == "--exclude=n2"


def test_a_clock_that_is_off_is_only_said() -> None:
    (finding,) = judged(cluster(clock=990.0))
    assert (finding.host, finding.is_bad) == ("n2", False)
    assert "-10 s" in finding.what
    assert exclude_line([finding]) is None


def test_room_for_two_checkpoints() -> None:
    assert judged(cluster(), checkpoint_bytes=2**39, copies=2) == []
    (finding,) = judged(cluster(), checkpoint_bytes=2**39 + 1, copies=2)
    assert finding.what == "1024.0 GiB free for 2 checkpoints of 512.0 GiB each"
    assert exclude_line([finding]) is None
    few = [dataclasses.replace(each, free_inodes=12) for each in cluster()]
    assert [finding.what for finding in judged(few)] == ["12 inodes free on the run folder's disk"]


def test_pinned_memory_needs_a_limit_that_lets_it() -> None:
    assert judged(cluster(memlock_bytes=2**33), pinned_bytes=2**33) == []
    (finding,) = judged(cluster(memlock_bytes=2**23), pinned_bytes=2**33)
    assert finding.host == "n2"
    assert "ulimit -l unlimited" in finding.what


def test_the_facts_of_this_machine(tmp_path: Path) -> None:
    (facts,) = collect(tmp_path / "run")
    assert facts.sees_shared
    assert facts.free_bytes > 0
    assert facts.versions["torch"]
    assert facts.reduce_gib_per_second is None
    assert list(tmp_path.iterdir()) == []
