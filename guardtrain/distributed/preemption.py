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
from typing import Any

from guardtrain.distributed.ranks import any_rank, gather, launched

log = logging.getLogger(__name__)

# sysexits.h: a temporary failure, try again. What a stopped run exits with, unless a person stopped it.
PREEMPTED = 75
BY_HAND = "Ctrl-C"
SIGNALS = {signal.SIGINT: BY_HAND, signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}


@dataclass
class StopRequests:
    """What may ask a run to stop.

    stop_file: its presence asks; only the main rank looks. owns_stop_file: one of an earlier run is removed when the run begins;
    a job script removes its own, and may have made this one while the model was loaded. deadline: seconds since 1970, None for
    no end; margin_seconds: how long before it the run stops, for saving takes time; at most half of what was left when the run
    began to listen.
    """

    stop_file: Path
    deadline: float | None = None
    margin_seconds: float = 600.0
    owns_stop_file: bool = True
    _signal: str | None = None
    _agreed: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    def listen(self) -> None:
        """Take signals over, and forget an earlier run's stop file. A second Ctrl-C ends the process at once."""
        if launched().is_main and self.owns_stop_file:
            self.stop_file.unlink(missing_ok=True)
        if self.deadline is not None:
            self.margin_seconds = min(self.margin_seconds, max(0.0, self.deadline - time.time()) / 2)
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def stop_listening(self) -> None:
        """Give the signals back. Not SIGTERM once the run was stopped: launchers send it to all when the first rank exits."""
        for number, handler in self._previous.items():
            was_stopped = self._agreed and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if was_stopped else handler)

    def agreed_reason(self) -> str | None:
        """Why all ranks must stop now, None when they need not; every rank must call it."""
        mine = self._reason()
        if not any_rank(mine is not None):
            return None
        self._agreed = True
        reasons: list[str | None] = gather(mine)
        return next(reason for reason in reasons if reason is not None)

    def _reason(self) -> str | None:
        if self._signal is not None:
            return self._signal
        if self.deadline is not None and time.time() > self.deadline - self.margin_seconds:
            return f"the job ends in {max(0.0, self.deadline - time.time()):.0f} s"
        if launched().is_main and self.stop_file.exists():
            return f"stop file {self.stop_file}"
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = SIGNALS[signal.Signals(number)]
        log.warning("stopping after this step, with a checkpoint (Ctrl-C once more to stop at once)")


def requests_of_the_job(run_folder: Path, margin_seconds: float) -> StopRequests:
    """What the job around this process says: $GUARDTRAIN_STOP_FILE, else `stop` in the run folder; $SLURM_JOB_END_TIME."""
    of_the_job = os.environ.get("GUARDTRAIN_STOP_FILE")
    end = os.environ.get("GUARDTRAIN_DEADLINE") or os.environ.get("SLURM_JOB_END_TIME")
    return StopRequests(
        stop_file=Path(of_the_job or run_folder / "stop"),
        deadline=float(end) if end else None,
        margin_seconds=margin_seconds,
        owns_stop_file=of_the_job is None,
    )


def tell_the_job(status: str) -> bool:
    """Write how all ranks ended into $GUARDTRAIN_STATUS_FILE, by the main rank; False where no job script asked for it.

    Launchers turn every exit code into 1 and print tracebacks of their own. A script that reads the status gets exit code 0.
    """
    name = os.environ.get("GUARDTRAIN_STATUS_FILE")
    if name and launched().is_main:
        Path(name).write_text(status + "\n", encoding="utf-8")
    return bool(name)
