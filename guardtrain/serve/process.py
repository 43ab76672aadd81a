"""The model in a process of its own: what kills it does not kill the server, and what hangs is ended and started anew."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from guardtrain.errors import ModelError, ServeError
from guardtrain.inference.scored import Prompt, Question, Scored
from guardtrain.serve.backend import Outstanding
from guardtrain.serve.engine import Ask, Drop
from guardtrain.serve.facts import GuardFacts
from guardtrain.serve.loading import ModelArguments
from guardtrain.serve.wire import pack, pack_order, unpack_done

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.1, 30.0
STABLE_SECONDS = 60.0  # a process that lived so long is started again at once
LOOK_SECONDS = 0.5


class _Child:
    """One model process and the socket to it. Orders are sent by a thread: a process that hangs reads nothing."""

    def __init__(self, arguments: ModelArguments) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "guardtrain.serve.model_process", str(theirs.fileno())]
            # Its standard output is nobody's: a command's own may be read as JSON.
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL)
        self.connection = Connection(ours.detach())
        self.started = time.monotonic()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self.send(pack(asdict(arguments)))
        threading.Thread(target=self._post, name="guard-orders", daemon=True).start()

    def send(self, data: bytes) -> None:
        """Send, some time; never blocks."""
        self._outbox.put(data)

    def receive(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The next message, None where there is none in time. Raises EOFError, OSError when it has died."""
        if not self.connection.poll(timeout_seconds):
            return None
        message: dict[str, Any] = json.loads(self.connection.recv_bytes())
        return message

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self._outbox.put(None)
        self.connection.close()

    def _post(self) -> None:
        try:
            while (data := self._outbox.get()) is not None:
                self.connection.send_bytes(data)
        except (OSError, ValueError):  # it died, or was closed
            return


class ProcessBackend:
    """Keeps one model process alive.

    When it dies, or gives no sign of life for `hang_seconds` while somebody waits, it is killed, all who wait get NoAnswer, and
    it is started anew, after a delay that doubles while it does not live long.
    """

    def __init__(
        self, arguments: ModelArguments, *, hang_seconds: float, on_event: Callable[[str], None] = lambda text: None
    ) -> None:
        self.restarts = 0
        self._arguments, self._hang_seconds, self._on_event = arguments, hang_seconds, on_event
        self._outstanding = Outstanding()
        self._child: _Child | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._quiet_since = 0.0
        self._thread: threading.Thread | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the process is there and loaded."""
        return self._child is not None

    @property
    def process_id(self) -> int | None:
        """Of the model process, None where there is none."""
        child = self._child
        return child.process.pid if child else None

    def start(self) -> GuardFacts:
        """Start the process; blocks until it has loaded. Raises ModelError where it cannot load, ServeError where it dies."""
        if self._thread is not None:
            raise ServeError("the guard was started already")
        loaded: Future[GuardFacts] = Future()
        self._thread = threading.Thread(target=self._supervise, args=(loaded,), name="guard-process", daemon=True)
        self._thread.start()
        return loaded.result()

    def submit(self, prompt: Prompt, question: Question) -> Future[Scored]:
        """Score one piece."""
        with self._lock:
            if not len(self._outstanding):
                self._quiet_since = time.monotonic()
            name, future = self._outstanding.open(lambda name: self._send(Drop(name)))
            child = self._child
            if child is not None:
                child.send(pack_order(Ask(name, prompt, question)))
        if child is None:
            self._outstanding.fail(name, "there is no model process")
        return future

    def close(self) -> None:
        """End the process."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _send(self, order: Drop) -> None:
        child = self._child
        if child is not None:
            child.send(pack_order(order))

    def _supervise(self, loaded: Future[GuardFacts]) -> None:
        delay = FIRST_DELAY_SECONDS
        while not self._closing.is_set():
            child = _Child(self._arguments)
            why = self._live(child, loaded)
            with self._lock:
                self._child = None
            lived = time.monotonic() - child.started
            child.end()
            self._outstanding.fail_all(why)
            if not loaded.done():
                loaded.set_exception(ServeError("the model process ended before it was ready", found=why))
            if loaded.exception() or self._closing.is_set():
                return
            self._on_event(f"{why}; it is started again")
            delay = FIRST_DELAY_SECONDS if lived > STABLE_SECONDS else min(2 * delay, LONGEST_DELAY_SECONDS)
            self._closing.wait(delay)
            self.restarts += 1

    def _live(self, child: _Child, loaded: Future[GuardFacts]) -> str:
        """Pass on what a process says until it ends; why it did."""
        try:
            while not self._closing.is_set():
                message = child.receive(LOOK_SECONDS)
                if message is None:
                    if self._hangs(child):
                        return f"the model process gave no sign of life for {self._hang_seconds:g} seconds"
                    continue
                self._take(message, child, loaded)
        except (EOFError, OSError):
            code = child.process.wait()
            return f"the model process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        return "the guard is closed"

    def _hangs(self, child: _Child) -> bool:
        is_waited_for = len(self._outstanding) > 0 and self._child is child
        return is_waited_for and time.monotonic() - self._quiet_since > self._hang_seconds

    def _take(self, message: dict[str, Any], child: _Child, loaded: Future[GuardFacts]) -> None:
        self._quiet_since = time.monotonic()
        if "done" in message:
            for name, scored in unpack_done(message):
                self._outstanding.give(name, scored)
        elif "loaded" in message:
            with self._lock:
                self._child = child
            if not loaded.done():
                loaded.set_result(GuardFacts.from_json(message["loaded"]))
        elif not loaded.done():
            loaded.set_exception(ModelError(message["refused"]))
