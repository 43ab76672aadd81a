"""Where every rank is, for the moment when one of them no longer answers.

Each rank writes what it begins into the launcher's store, which lives outside of the ranks and outlasts them. When a collective
fails, or nothing has moved for almost as long as a collective may take, the ranks that still run say where all of them were.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from guardtrain.distributed.ranks import launched
from guardtrain.errors import DistributedError

log = logging.getLogger(__name__)

# How long to wait for the store: the host that holds it may be the one that is gone.
ANSWER_SECONDS = 10.0
LOOKS_PER_TIMEOUT = 20


class Whereabouts:
    """What this rank does, for all to read; nothing where no launcher started it.

    timeout_seconds: of collectives. When this rank has not moved for nine tenths of it, it says where all ranks are: on GPUs the
    timeout itself ends the process before Python could say anything.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.ranks = launched()
        self._store: Any = dist.distributed_c10d._get_default_store() if dist.is_initialized() and self.ranks.size > 1 else None
        self._patience = 0.9 * timeout_seconds
        self.what, self._since = "the beginning", time.monotonic()
        self._stopped = threading.Event()
        if self._store is not None:
            threading.Thread(target=self._watch, args=(timeout_seconds / LOOKS_PER_TIMEOUT,), daemon=True).start()

    def at(self, what: str) -> None:
        """This rank begins `what`."""
        self.what, self._since = what, time.monotonic()
        if self._store is not None:
            place = {"host": socket.gethostname(), "what": what, "since": time.time()}
            self._store.set(_key(self.ranks.index), json.dumps(place))

    def close(self) -> None:
        """Stop watching: from here on nobody waits for anybody."""
        self._stopped.set()

    def report(self) -> list[str]:
        """One line for each rank, in which what it began last and how long ago; at most ANSWER_SECONDS later."""
        if self._store is None:
            return []
        return _within(ANSWER_SECONDS, self._read, [f"the store on {_store_host()} does not answer"])

    def _read(self) -> list[str]:
        store: Any = self._store.clone()  # of its own: the main thread may be waiting in the other
        store.set_timeout(timedelta(seconds=ANSWER_SECONDS / 2))
        keys = [_key(rank) for rank in range(self.ranks.size)]
        return [_line(rank, store.get(key) if store.check([key]) else None) for rank, key in enumerate(keys)]

    def _watch(self, every_seconds: float) -> None:
        said = None
        while not self._stopped.wait(every_seconds):
            if time.monotonic() - self._since > self._patience and said != self._since:
                said = self._since
                lines = "; ".join(self.report())
                # As an error, for of the other ranks only errors are shown.
                log.error("rank %d has not moved for %.0f s: %s", self.ranks.index, time.monotonic() - self._since, lines)


def failed_collective(error: Exception, whereabouts: Whereabouts) -> DistributedError | None:
    """What a rank says when others did not answer; None when the error is something else."""
    # gloo raises plain RuntimeErrors, which begin with the place in its source.
    if not isinstance(error, dist.DistError) and not any(name in str(error) for name in ("gloo", "NCCL")):
        return None
    first = str(error).splitlines()[0]
    return DistributedError(
        "another rank does not answer",
        where=f"rank {whereabouts.ranks.index}",
        found="; ".join([first, *whereabouts.report()]),
        hint="--resume continues from the newest checkpoint",
    )


def _key(rank: int) -> str:
    return f"guardtrain/where/{rank}"


def _line(rank: int, value: bytes | None) -> str:
    if value is None:
        return f"rank {rank} has not begun"
    place: dict[str, Any] = json.loads(value)
    return f"rank {rank} on {place['host']}: {place['what']} since {max(0.0, time.time() - place['since']):.0f} s"


def _store_host() -> str:
    return os.environ.get("MASTER_ADDR", "the first host")


def _within(seconds: float, action: Callable[[], list[str]], otherwise: list[str]) -> list[str]:
    """The result of `action`, or `otherwise` where it fails or takes longer; a thread that hangs is left behind."""
    results: list[list[str]] = []

    def call() -> None:
        try:
            results.append(action())
        except (RuntimeError, ValueError):  # torch's own kinds of errors are all of these
            results.append(otherwise)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise
