"""uvicorn with an end that loses nothing: not ready at once, requests in flight finish, then the process ends with a code."""

from __future__ import annotations

import signal
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from guardtrain.errors import ConfigError
from guardtrain.serve.record import Lifecycle

if TYPE_CHECKING:
    from fastapi import FastAPI

INTERRUPTED = 130
# Time for probes that are under way, and for streams that are cut at the end of the drain.
LAST_SECONDS = 5


class Server(uvicorn.Server):
    """Ends in two steps: after SIGTERM or Ctrl-C it drains, and a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, drain_seconds: float) -> None:
        super().__init__(config)
        self.lifecycle, self.drain_seconds = lifecycle, drain_seconds
        self.ended_by: int | None = None
        self._drains_until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come. It is not raised again at the end, as uvicorn would: the exit code tells how it went."""
        if self.lifecycle.is_draining:
            self.should_exit = self.force_exit = True
        self.lifecycle.is_draining = True
        self.ended_by, self._drains_until = sig, time.monotonic() + self.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        is_drained = self.lifecycle.in_flight == 0 or time.monotonic() > self._drains_until
        if self.lifecycle.failure is not None or (self.lifecycle.is_draining and is_drained):
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, and tells the real port for port 0. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it. asyncio sets it only on sockets that say they are TCP, which this one does not: an answer's body
        # would wait 40 ms for the client's word that its headers have come.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        expected = "a host and a free port of this machine"
        raise ConfigError("cannot listen", where=f"--host {host} --port {port}", expected=expected, found=str(error)) from error


def run(app: FastAPI, listener: socket.socket, *, drain_seconds: float) -> int:
    """Serve until a signal comes; 0 after SIGTERM, 130 after Ctrl-C. Raises whatever kept the guard from starting."""
    lifecycle: Lifecycle = app.state.lifecycle
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "http": "h11", "ws": "none"}
    config = uvicorn.Config(app, lifespan="on", timeout_graceful_shutdown=LAST_SECONDS, **options)
    server = Server(config, lifecycle, drain_seconds)
    server.run(sockets=[listener])
    if lifecycle.failure is not None:
        raise lifecycle.failure
    return INTERRUPTED if server.ended_by == signal.SIGINT else 0
