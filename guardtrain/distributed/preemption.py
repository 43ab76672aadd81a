"""When a run has to stop before it is done: a signal, a stop file, the end of the job's time.

Launchers do not pass signals on, so a job script turns its signal into a file on shared disk (`slurm/train.sbatch`). Every rank
asks `agreed_reason` at the same step: they save and end together.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from guardtrain.distributed.ranks import any_rank, gather, launched

log = logging.getLogger(__name__)

Status = Literal["done", "negative", "refused", "preempted", "stopped", "interrupted"]
# How a run has ended, and what it exits with. preempted: it goes on by itself (75 is sysexits.h's temporary failure); stopped and
# interrupted: by a person.
EXIT_CODES: dict[Status, int] = {"done": 0, "negative": 1, "refused": 2, "preempted": 75, "stopped": 75, "interrupted": 130}
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}


@dataclass(frozen=True)
class StopReason:
    """text: for people. status: whether the run goes on by itself."""

    text: str
    status: Status = "preempted"


@dataclass
class StopRequests:
    """What may ask a run to stop.

    stop_file: a person's, in the run folder; one of an earlier run is removed when the run begins. job_stop_file: the job
    script's, which removes its own, and may have made it while the model was loaded. Only the main rank looks for files.
    deadline: seconds since 1970, None for no end; margin_seconds: how long before it the run stops, for saving takes time; at
    most half of what was left when the run began to listen.
    """

    stop_file: Path
    job_stop_file: Path | None = None
    deadline: float | None = None
    margin_seconds: float = 600.0
    _signal: StopReason | None = None
    _agreed: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    def listen(self) -> None:
        """Take signals over, and forget an earlier run's stop file. A second Ctrl-C ends the process at once."""
        if launched().is_main:
            self.stop_file.unlink(missing_ok=True)
        if self.deadline is not None:
            self.margin_seconds = min(self.margin_seconds, max(0.0, self.deadline - time.time()) / 2)
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def stop_listening(self) -> None:
        """Give the signals back. Not SIGTERM once the run was stopped: launchers send it to all when the first rank exits."""
        for number, handler in self._previous.items():
            was_stopped = self._agreed and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if was_stopped else handler)

    def agreed_reason(self) -> StopReason | None:
        """Why all ranks must stop now, None when they need not; every rank must call it."""
        mine = self._reason()
        if not any_rank(mine is not None):
            return None
        self._agreed = True
        reasons: list[StopReason | None] = gather(mine)
        return next(reason for reason in reasons if reason is not None)

    def _reason(self) -> StopReason | None:
        if self._signal is not None:
            return self._signal
        if self.deadline is not None and time.time() > self.deadline - self.margin_seconds:
            return StopReason(f"the job ends in {max(0.0, self.deadline - time.time()):.0f} s")
        if not launched().is_main:
            return None
        if self.stop_file.exists():
            return StopReason(f"stop file {self.stop_file}", "stopped")
        if self.job_stop_file is not None and self.job_stop_file.exists():
            return StopReason(f"stop file {self.job_stop_file}")
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = StopReason(SIGNALS[signal.Signals(number)], "interrupted" if number == signal.SIGINT else "preempted")
        log.warning("stopping after this step, with a checkpoint (Ctrl-C once more to stop at once)")


def requests_of_the_job(run_folder: Path, margin_seconds: float) -> StopRequests:
    """`stop` in the run folder, and what the job around this process says: $GUARDTRAIN_STOP_FILE, $GUARDTRAIN_DEADLINE."""
    of_the_job = os.environ.get("GUARDTRAIN_STOP_FILE")
    end = os.environ.get("GUARDTRAIN_DEADLINE") or os.environ.get("SLURM_JOB_END_TIME")
    return StopRequests(
        stop_file=run_folder / "stop",
        job_stop_file=Path(of_the_job) if of_the_job else None,
        deadline=float(end) if end else None,
        margin_seconds=margin_seconds,
    )


def tell_the_job(status: Status) -> bool:
    """Write how all ranks ended into $GUARDTRAIN_STATUS_FILE, on each node; False where no job script asked for it.

    Launchers turn every exit code into 1 and print tracebacks of their own. A script that reads the status gets exit code 0.
    """
    name = os.environ.get("GUARDTRAIN_STATUS_FILE")
    if name and launched().local_index == 0:
        Path(name).write_text(status + "\n", encoding="utf-8")
    return bool(name)
