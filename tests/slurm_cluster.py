"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd of our own, in a folder that goes away."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

MUNGE_FILES = ("socket", "key-file", "pid-file", "log-file", "seed-file")
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its old credentials have expired: two minutes, unless they expire at once.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
MailProg=/bin/true
KillWait=5
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n0,n1 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs. environment: what its commands need."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        """Run a command of Slurm's and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def states(self, job: str) -> list[str]:
        """The state of a job, or of every job of an array."""
        return [word.split("=")[1] for word in self.call("scontrol", "show", "job", job).split() if word.startswith("JobState=")]

    def restarts(self, job: str) -> int:
        """How often a job was put back into the queue."""
        return next(int(w.split("=")[1]) for w in self.call("scontrol", "show", "job", job).split() if w.startswith("Restarts="))

    def cancel_all(self) -> None:
        """End every job, requeued ones included, so that no step outlives the cluster."""
        subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, check=False)
        self.wait("an empty queue", lambda: not self.call("squeue", "-h"), 60)

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.call('scontrol', 'show', 'job')}"
            time.sleep(0.3)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes, n0 and n1, of one pretended GPU each."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        why = f"not installed: {', '.join(missing)} (apt install slurm-wlm munge)" if missing else "a slurmd needs root"
        if os.environ.get("GUARDTRAIN_REQUIRE_SLURM"):
            pytest.fail(why)
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    settings = {"host": socket.gethostname(), "user": getpass.getuser(), "ports": _free_ports(3)}
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, **settings))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{file}={folder}/munge.{file.removesuffix('-file')}" for file in MUNGE_FILES]
    daemons = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n0"],
        ["slurmd", "-D", "-N", "n1"],
    ]
    running = []
    try:
        for command in daemons:
            log = (folder / f"{'-'.join(command).replace('/', '_')[:20]}.out").open("w")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
            if command[0] == "munged":
                _wait_for(folder / "munge.socket")
        cluster = Slurm(folder, environment)
        cluster.wait("both nodes idle", lambda: _idle(cluster), 60)
        yield cluster
        cluster.cancel_all()
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(timeout=30)


def _idle(cluster: Slurm) -> bool:
    done = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=cluster.environment, capture_output=True, text=True, check=False)
    return done.stdout.split() == ["idle", "2"]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
