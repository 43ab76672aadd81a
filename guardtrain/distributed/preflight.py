"""Before the first step of a long run: is every node what the others are, and is there room for what will be written?

Each rank collects `Facts`; the main rank judges them. Judging is pure, so what would be said of a broken cluster can be tested
without one.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from guardtrain.distributed.ranks import gather, launched, together

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "guardtrain")
MAX_SKEW_SECONDS = 5.0
MIB = 2**20
PROBE_BYTES = 64 * MIB
LISTING_SECONDS = 10.0  # a network disk may show a new file only after a while


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one rank knows of its node.

    devices: names of the GPUs it sees; versions: of the packages that must agree; sees_shared: whether it found the main rank's
    file in the run folder; free_bytes, free_inodes: of that folder's disk; clock: seconds since 1970, read right after a barrier;
    memlock_bytes: limit of pinned memory, -1 for none; reduce_gib_per_second: of an all-reduce over all ranks, None alone.
    """

    rank: int
    host: str
    devices: tuple[str, ...]
    versions: dict[str, str]
    sees_shared: bool
    free_bytes: int
    free_inodes: int
    clock: float
    memlock_bytes: int
    reduce_gib_per_second: float | None


@dataclass(frozen=True)
class Finding:
    """host: the node that stands out, empty where all do; what: one line; is_bad: whether the run must not start."""

    host: str
    what: str
    is_bad: bool = True

    def __str__(self) -> str:
        return f"{self.host}: {self.what}" if self.host else self.what


def collect(run_folder: Path) -> list[Facts]:
    """The facts of all ranks, by rank; every rank must call it. Leaves nothing behind."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # the name that `sbatch --exclude` knows
    disk = os.statvfs(_existing(run_folder))
    sees_shared = _sees_shared(_existing(run_folder)) if len(set(gather(host))) > 1 else True
    gather(None)
    clock = time.time()
    facts = Facts(
        rank=launched().index,
        host=host,
        devices=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        versions={name: version for name in PACKAGES if (version := _version(name)) is not None},
        sees_shared=sees_shared,
        free_bytes=disk.f_bavail * disk.f_frsize,
        free_inodes=disk.f_favail,
        clock=clock,
        memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        reduce_gib_per_second=_reduce_rate(),
    )
    everybody: list[Facts] = gather(facts)
    return everybody


def _sees_shared(folder: Path) -> bool:
    """Whether this rank finds a file that the main rank makes for a moment."""
    is_main = launched().is_main
    probe = gather(folder / f".guardtrain-preflight-{uuid.uuid4().hex}")[0]
    try:
        together(lambda: probe.touch() if is_main else None)
        deadline = time.monotonic() + LISTING_SECONDS
        while not (seen := bool(probe.exists())) and time.monotonic() < deadline:
            time.sleep(0.2)
        gather(None)
    finally:
        if is_main:
            probe.unlink(missing_ok=True)
    return seen


def _existing(folder: Path) -> Path:
    """The nearest folder that is there: the run's own may not be yet."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def judge(facts: Sequence[Facts], *, checkpoint_bytes: int, copies: int = 1, pinned_bytes: int = 0) -> Iterator[Finding]:
    """What stands out.

    checkpoint_bytes: predicted size of one checkpoint; copies: how many more will lie there at once; pinned_bytes: a rank's
    pinned memory under offload.
    """
    for field in ("devices", "versions"):
        values = {each.rank: getattr(each, field) for each in facts}
        usual, _ = Counter(map(repr, values.values())).most_common(1)[0]
        for each in _one_a_host(each for each in facts if repr(values[each.rank]) != usual):
            yield Finding(each.host, f"{field} differ: {values[each.rank]}, elsewhere {usual}")
    for each in _one_a_host(each for each in facts if not each.sees_shared):
        yield Finding(each.host, "the run folder is not the one that the main rank wrote into")
    main = facts[0]
    for each in _one_a_host(each for each in facts if abs(each.clock - main.clock) > MAX_SKEW_SECONDS):
        yield Finding(each.host, f"its clock is {each.clock - main.clock:+.0f} s off the main rank's", is_bad=False)
    if main.free_bytes < copies * checkpoint_bytes:
        yield Finding("", f"{_readable(main.free_bytes)} free for {copies} checkpoints of {_readable(checkpoint_bytes)} each")
    if main.free_inodes < 1000:
        yield Finding("", f"{main.free_inodes} inodes free on the run folder's disk")
    for each in _one_a_host(each for each in facts if 0 <= each.memlock_bytes < pinned_bytes):
        what = f"memlock is {_readable(each.memlock_bytes)}, offload pins {_readable(pinned_bytes)} (ulimit -l unlimited)"
        yield Finding(each.host, what, is_bad=False)  # CUDA pins past the limit, network cards and NVMe do not


def exclude_line(findings: Sequence[Finding]) -> str | None:
    """What to give sbatch so that the job starts on other nodes; None where no single node is bad."""
    hosts = sorted({finding.host for finding in findings if finding.is_bad and finding.host})
    return f"--exclude={','.join(hosts)}" if hosts else None


def _one_a_host(facts: Iterator[Facts]) -> Iterator[Facts]:
    seen: set[str] = set()
    for each in facts:
        if each.host not in seen:
            seen.add(each.host)
            yield each


def _reduce_rate() -> float | None:
    """GiB of gradients that all ranks sum up in a second; the second of two tries, the first one connects."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    values = torch.zeros(PROBE_BYTES // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(2):
        start = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()  # waits for the device
        seconds = time.perf_counter() - start
    return PROBE_BYTES / 2**30 / seconds


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
