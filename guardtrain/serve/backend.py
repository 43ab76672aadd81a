"""Where the model runs. One small protocol; this process's own thread is the first that keeps it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

from guardtrain.errors import ServeError
from guardtrain.inference.scored import Prompt, Question, Scored
from guardtrain.serve.engine import Ask, Drop, Engine, Inbox, run
from guardtrain.serve.facts import GuardFacts


class NoAnswer(Exception):
    """The model gave no score: it died, raised, or answered something else. The message is for logs and holds no prompt."""


class Backend(Protocol):
    """Scores pieces of prompts, batching them as it can. Any thread may call; only what says so blocks."""

    @property
    def is_ready(self) -> bool:
        """Whether a piece would be scored now."""

    @property
    def restarts(self) -> int:
        """How often the model had to be started again."""

    def start(self) -> GuardFacts:
        """Load the model; blocks until it is ready. Raises GuardtrainError."""

    def submit(self, prompt: Prompt, question: Question) -> Future[Scored]:
        """Score one piece. The future gives NoAnswer where there is no score; cancelling it lets the piece go."""

    def close(self) -> None:
        """End; what is under way gives NoAnswer."""


class Outstanding:
    """The pieces that somebody waits for, by name. A name is given once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names = itertools.count()
        self._futures: dict[int, Future[Scored]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def open(self, on_cancelled: Callable[[int], None]) -> tuple[int, Future[Scored]]:
        """A new name and its future. on_cancelled: is told the name when nobody waits any more."""
        future: Future[Scored] = Future()
        with self._lock:
            name = next(self._names)
            self._futures[name] = future

        def look(done: Future[Scored]) -> None:
            if done.cancelled() and self._take(name):
                on_cancelled(name)

        future.add_done_callback(look)
        return name, future

    def give(self, name: int, scored: Scored) -> None:
        """Resolve a future; one that nobody waits for any more is left alone."""
        future = self._take(name)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(scored)

    def fail(self, name: int, why: str) -> None:
        """Give NoAnswer to who waits for this piece."""
        future = self._take(name)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_exception(NoAnswer(why))

    def fail_all(self, why: str) -> None:
        """Give NoAnswer to all who wait."""
        with self._lock:
            futures, self._futures = list(self._futures.values()), {}
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(NoAnswer(why))

    def _take(self, name: int) -> Future[Scored] | None:
        with self._lock:
            return self._futures.pop(name, None)


class ThreadBackend:
    """The model in a thread of this process: for programs that check prompts themselves.

    load: makes the engine and tells what it holds; runs in `start`. An error of the model ends the backend.
    """

    restarts = 0

    def __init__(self, load: Callable[[], tuple[Engine, GuardFacts]]) -> None:
        self._load = load
        self._inbox: Inbox = SimpleQueue()
        self._outstanding = Outstanding()
        self._thread: threading.Thread | None = None
        self._has_ended = False
        self._why_dead = "the guard is closed"

    @property
    def is_ready(self) -> bool:
        """Whether the thread works."""
        return self._thread is not None and not self._has_ended

    def start(self) -> GuardFacts:
        """Load the model in the caller's thread. Raises ModelError, ConfigError."""
        if self._thread is not None:
            raise ServeError("the guard was started already")
        engine, facts = self._load()
        self._thread = threading.Thread(target=self._work, args=(engine,), name="guard", daemon=True)
        self._thread.start()
        return facts

    def submit(self, prompt: Prompt, question: Question) -> Future[Scored]:
        """Score one piece."""
        name, future = self._outstanding.open(lambda name: self._inbox.put(Drop(name)))
        self._inbox.put(Ask(name, prompt, question))
        if self._has_ended:  # who ends it fails what is open by then
            self._outstanding.fail_all(self._why_dead)
        return future

    def close(self) -> None:
        """End the thread after its turn."""
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self, engine: Engine) -> None:
        try:
            run(engine, self._inbox, self._done)
        except Exception as error:  # the model's: out of memory, a broken weight
            self._why_dead = f"the model raised {type(error).__name__}"
        finally:
            self._has_ended = True
            self._outstanding.fail_all(self._why_dead)

    def _done(self, finished: list[tuple[int, Scored]]) -> None:
        for name, scored in finished:
            self._outstanding.give(name, scored)
