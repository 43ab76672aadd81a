"""Two hosts that share a disk and a cable: network namespaces with names of their own, joined by a veth pair."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import REPOSITORY, Launched, rank_environment, ranks_of, steps_of

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(1800)]

TIMEOUT_SECONDS = 15


@dataclass(frozen=True)
class Hosts:
    """Two hosts, `prefix`0 at 10.77.0.1 and `prefix`1 at 10.77.0.2."""

    prefix: str

    def start(self, host: int, arguments: list[str], hidden: Path | None = None) -> subprocess.Popen[str]:
        """launch/node.sh on a host, as a person would type it there. hidden: a folder in whose place it has one of its own."""
        name = f"{self.prefix}{host}"
        node = {"NNODES": "2", "NODE_RANK": str(host), "MASTER_ADDR": "10.77.0.1", "GPUS_PER_NODE": "1"}
        command = ["bash", str(REPOSITORY / "launch" / "node.sh"), "ddp", *arguments]
        mount = f"mount -t tmpfs own {hidden} && " if hidden else ""
        begin = ["unshare", "--uts", "--mount", "sh", "-c", f'{mount}hostname "$0" && exec "$@"', name]
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *begin, *command],
            env={**rank_environment(), **node, "GLOO_SOCKET_IFNAME": f"{name}-eth"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def link(self, state: str) -> None:
        """Plug the cable in ("up") or cut it ("down")."""
        ip("-n", f"{self.prefix}0", "link", "set", f"{self.prefix}0-eth", state)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts with a cable between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        if os.environ.get("GUARDTRAIN_REQUIRE_SLURM"):
            pytest.fail("no iproute2, or not root")
        pytest.skip("network namespaces need iproute2 and root")
    prefix = f"gt{os.getpid() % 10000}-"
    names = [f"{prefix}{host}" for host in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [["name", f"{name}-eth", "netns", name] for name in names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{host + 1}/24", "dev", f"{name}-eth")
            ip("-n", name, "link", "set", f"{name}-eth", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(prefix)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def test_a_cut_link_ends_both_hosts_with_a_clear_error_and_a_resume_finishes(
    hosts: Hosts, tiny_recipe: list[str], launch: Callable[..., Launched], tmp_path: Path
) -> None:
    expected = launch(tmp_path / "expected", "ddp", "train.save_steps=10", "train.max_steps=60")
    run = tmp_path / "run"
    recipe = [*tiny_recipe, f"output.dir={run}", "train.save_steps=10", "train.max_steps=60"]
    recipe.append(f"distributed.timeout_seconds={TIMEOUT_SECONDS}")

    both = [hosts.start(host, recipe) for host in range(2)]
    wait_for_step(run, 15, both)
    hosts.link("down")
    cut = time.monotonic()
    said = [each.communicate(timeout=TIMEOUT_SECONDS + 60)[0] for each in both]
    assert time.monotonic() - cut < TIMEOUT_SECONDS + 30
    assert [each.returncode for each in both] == [1, 1]
    assert ranks_of(run) == []
    assert 15 <= len(steps_of(run)) < 60, "the link was cut too late to test anything"
    for text in said:
        assert "DistributedError: rank" in text, text[-4000:]
        assert "another rank does not answer" in text
    # The first host keeps the store, so it can say where the other was; the second only that nobody answers.
    first = said[0].replace("\n", "")
    assert f"rank 1 on {hosts.prefix}1: step" in first, first[-4000:]

    hosts.link("up")
    both = [hosts.start(host, [*recipe, "--resume"]) for host in range(2)]
    said = [each.communicate(timeout=240)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], said[0][-4000:] + said[1][-4000:]
    assert [each["loss"] for each in steps_of(run)] == expected.curve("loss")


@pytest.mark.parametrize("flags", [["--check"], []])
def test_a_host_that_sees_another_disk_is_named_before_anything_starts(
    flags: list[str], hosts: Hosts, tiny_recipe: list[str], tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    arguments = [*tiny_recipe, f"output.dir={shared}/run", *flags]
    both = [hosts.start(0, arguments), hosts.start(1, arguments, hidden=shared)]
    said = [each.communicate(timeout=120)[0].replace("\n", "") for each in both]
    assert both[0].returncode == (1 if flags else 2), said[0]
    assert f"{hosts.prefix}1: the run folder is not the one that the main rank wrote into" in said[0]
    assert f"--exclude={hosts.prefix}1" in said[0]
    assert "Traceback" not in said[0]
    assert list(shared.iterdir()) == []


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 180
    while len(steps_of(run)) < step:
        ended = [each for each in processes if each.poll() is not None]
        assert not ended, "\n".join(each.communicate()[0][-4000:] for each in ended)
        assert time.monotonic() < deadline
        time.sleep(0.05)
