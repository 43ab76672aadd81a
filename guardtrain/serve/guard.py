"""A guard as a program uses it: load it once, check prompts, get a verdict or a plain word that there is none."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from guardtrain.errors import ServeError
from guardtrain.inference.scored import Prompt, Scored
from guardtrain.serve.backend import Backend
from guardtrain.serve.backends import make_backend
from guardtrain.serve.cache import RecentlyUsed
from guardtrain.serve.facts import GuardFacts, name_of
from guardtrain.serve.judging import Judgement, check_mode, default_mode, judge, modes_of, question_of
from guardtrain.serve.options import GuardOptions
from guardtrain.serve.reading import Refused, UnreadPrompt, pieces_of, turns_of
from guardtrain.serve.verdict import Failure, Status, Verdict

SHORT_CHARACTERS = 2_000  # longer prompts are normalised and cut by a thread: an event loop has others to serve
Key = tuple[str, tuple[Prompt, ...]]
Outcome = Judgement | Failure


@dataclass(slots=True)
class _Pending:
    """One prompt that is being scored, for all who asked for it meanwhile."""

    pieces: list[Future[Scored]] = field(default_factory=list)
    waiting: list[Future[Outcome]] = field(default_factory=list)


class Guard:
    """Checks prompts with one model. Make it with `Guard.load`; any number of threads and event loops may share it.

    None of the checking methods raises for what the model, the queue or the clock did: that is a verdict without a decision,
    which blocks unless a caller decides otherwise. They raise ConfigError for a mode that the guard has not.
    """

    def __init__(self, backend: Backend, name: str, mode: str | None, options: GuardOptions) -> None:
        self.name, self.options = name, options
        self._backend = backend
        self._wanted_mode = mode
        self._facts: GuardFacts | None = None
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._loading: Future[GuardFacts] | None = None
        self._known: RecentlyUsed[Key, Judgement] = RecentlyUsed(options.cache)
        self._pending: dict[Key, _Pending] = {}
        self._num_pieces = self._num_reading = 0
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="guard-reader")

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        mode: str | None = None,
        backend: str = "transformers",
        policy: str | None = None,
        device: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        options: GuardOptions | None = None,
    ) -> Guard:
        """A guard that is ready when it was entered (`with`, `async with`) or started; the first check starts it too.

        model: a run, a model folder or a base model. mode: off, on, both or cascade; if absent the cascade where there is one.
        backend: "transformers" in this process, "process" in one of its own; on a server at `base_url` that serves the same
        weights and gives log-probabilities "openai" (completions of token ids) or, where that cannot be had, "openai-chat".
        Raises ConfigError.
        """
        options = options or GuardOptions()
        made = make_backend(
            backend, str(model), policy=policy, device=device, base_url=base_url, api_key=api_key, options=options
        )
        return cls(made, name_of(model), mode, options)

    # --- what it is

    @property
    def mode(self) -> str:
        """The mode in which prompts are checked where none is named."""
        return self._wanted_mode or default_mode(self._loaded())

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that it can be asked in."""
        return modes_of(self._loaded())

    @property
    def threshold_version(self) -> str:
        """Of its calibration."""
        return self._facts.threshold_version if self._facts else "uncalibrated"

    @property
    def is_ready(self) -> bool:
        """Whether a prompt would be judged now: loaded, and the model alive."""
        return self._facts is not None and self._backend.is_ready

    @property
    def queue_depth(self) -> int:
        """Prompts, or chunks of long ones, that wait for the model or are with it."""
        return self._num_pieces

    @property
    def restarts(self) -> int:
        """How often the model process had to be started again."""
        return self._backend.restarts

    @property
    def cache_hits(self) -> int:
        """Prompts that were answered from memory."""
        return self._known.hits

    # --- life

    def begin(self) -> None:
        """Begin to load the model, unless that was done; `start` waits for it. For who has something else to do meanwhile."""
        with self._starting:
            if self._loading is None:
                self._loading = Future()
                threading.Thread(target=self._load, args=(self._loading,), name="guard-start", daemon=True).start()

    async def start(self) -> None:
        """Load the model; ready when it returns. Raises GuardtrainError."""
        await asyncio.to_thread(self._start)

    async def aclose(self) -> None:
        """End the model; prompts that are being judged get a verdict without a decision."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """As `aclose`."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._backend.close()

    def __enter__(self) -> Guard:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Guard:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    # --- checks

    def check(self, prompt: UnreadPrompt, *, mode: str | None = None, timeout_seconds: float | None = None) -> Verdict:
        """Judge a text or a conversation (`{"role": …, "content": …}` a turn)."""
        (verdict,) = self.check_many([prompt], mode=mode, timeout_seconds=timeout_seconds)
        return verdict

    def check_many(
        self, prompts: Sequence[UnreadPrompt], *, mode: str | None = None, timeout_seconds: float | None = None
    ) -> list[Verdict]:
        """Judge each prompt; verdicts in their order. timeout_seconds: of all together."""
        if self._facts is None:
            self._start()
        mode, start = self._checked(mode), time.perf_counter()
        futures = [self._ask(prompt, mode) for prompt in prompts]
        end = start + (timeout_seconds or self.options.timeout_seconds)
        return [self._verdict(_wait(future, end - time.perf_counter()), mode, start) for future in futures]

    async def acheck(self, prompt: UnreadPrompt, *, mode: str | None = None, timeout_seconds: float | None = None) -> Verdict:
        """As `check`; callers at the same time share the model's batches. A cancelled call lets its prompt go."""
        if self._facts is None:
            await asyncio.to_thread(self._start)
        mode, start = self._checked(mode), time.perf_counter()
        future = asyncio.wrap_future(self._ask(prompt, mode))
        try:
            outcome = await asyncio.wait_for(future, timeout_seconds or self.options.timeout_seconds)
        except TimeoutError:
            outcome = Failure.TIMEOUT
        return self._verdict(outcome, mode, start)

    async def acheck_many(
        self, prompts: Sequence[UnreadPrompt], *, mode: str | None = None, timeout_seconds: float | None = None
    ) -> list[Verdict]:
        """As `check_many`."""
        checks = (self.acheck(prompt, mode=mode, timeout_seconds=timeout_seconds) for prompt in prompts)
        return list(await asyncio.gather(*checks))

    async def explain(self, prompt: UnreadPrompt, *, timeout_seconds: float | None = None) -> Verdict:
        """The verdict of mode `on`, with its reason: for a text that was blocked without one. Raises ConfigError."""
        return await self.acheck(prompt, mode="on", timeout_seconds=timeout_seconds)

    # --- how

    def _start(self) -> GuardFacts:
        self.begin()
        assert self._loading is not None
        return self._loading.result()

    def _load(self, loading: Future[GuardFacts]) -> None:
        try:
            facts = self._backend.start()
            if self._wanted_mode is not None:
                check_mode(self._wanted_mode, facts)
        except BaseException as error:
            loading.set_exception(error)
        else:
            self._facts = facts
            loading.set_result(facts)

    def _loaded(self) -> GuardFacts:
        if self._facts is None:
            raise ServeError("the guard is not loaded yet", hint="enter it (with …) or call start")
        return self._facts

    def _checked(self, mode: str | None) -> str:
        return check_mode(mode, self._loaded()) if mode else self.mode

    def _ask(self, prompt: UnreadPrompt, mode: str) -> Future[Outcome]:
        """Begin to judge a prompt; the future never raises. Cancelling it lets the prompt go where nobody else asked for it."""
        future: Future[Outcome] = Future()
        try:
            turns = turns_of(prompt)
            if sum(len(turn.content) for turn in turns) <= SHORT_CHARACTERS:
                self._read(turns, mode, future)
            else:
                self._readers.submit(self._read_long, turns, mode, self._counted(future))
        except Refused as refused:
            future.set_result(refused.failure)
        except RuntimeError:  # the guard is closed: no thread takes work any more
            future.set_result(Failure.MODEL)
        return future

    def _counted(self, future: Future[Outcome]) -> Future[Outcome]:
        """A long prompt waits to be read. Raises Refused where too many do."""
        with self._lock:
            if self._num_reading >= self.options.queue:
                raise Refused(Failure.OVERLOADED)
            self._num_reading += 1
        return future

    def _read_long(self, turns: Prompt, mode: str, future: Future[Outcome]) -> None:
        with self._lock:
            self._num_reading -= 1
        if not future.cancelled():
            self._read(turns, mode, future)

    def _read(self, turns: Prompt, mode: str, future: Future[Outcome]) -> None:
        """Normalise a prompt, cut it into pieces, and have them scored unless the verdict is known or under way."""
        facts, options = self._loaded(), self.options
        try:
            pieces = pieces_of(
                turns,
                facts.encoder,
                chunk_tokens=options.chunk_tokens or facts.max_prompt_tokens,
                max_tokens=options.max_tokens,
                max_characters=options.max_characters,
                normalise=options.normalise,
            )
            self._join((mode, tuple(pieces)), future)
        except Refused as refused:
            _give(future, refused.failure)

    def _join(self, key: Key, future: Future[Outcome]) -> None:
        """Answer from memory, wait with others who asked the same, or ask the model. Raises Refused."""
        with self._lock:
            if (known := self._known.get(key)) is not None:
                _give(future, known)
                return
            pending = self._pending.get(key)
            is_new = pending is None
            if pending is None:
                if self._num_pieces >= self.options.queue:
                    raise Refused(Failure.OVERLOADED)
                pending = self._pending[key] = _Pending()
                self._num_pieces += len(key[1])
            pending.waiting.append(future)
        if is_new:
            self._submit(key, pending)
        future.add_done_callback(lambda done: self._leave(key, pending, future) if done.cancelled() else None)

    def _submit(self, key: Key, pending: _Pending) -> None:
        mode, pieces = key
        question = question_of(mode, self._loaded())
        left = len(pieces)
        lock = threading.Lock()

        def one_done(_: Future[Scored]) -> None:
            nonlocal left
            with lock:
                left -= 1
                is_last = left == 0
            if is_last:
                self._finish(key, pending)

        pending.pieces = [self._backend.submit(piece, question) for piece in pieces]
        for piece in pending.pieces:
            piece.add_done_callback(one_done)

    def _finish(self, key: Key, pending: _Pending) -> None:
        """All pieces are scored, or given up: tell those who wait."""
        outcome = self._outcome(key[0], pending.pieces)
        with self._lock:
            self._num_pieces -= len(key[1])
            if self._pending.get(key) is pending:
                del self._pending[key]
            if isinstance(outcome, Judgement):
                self._known.put(key, outcome)
            waiting, pending.waiting = pending.waiting, []
        for future in waiting:
            _give(future, outcome)

    def _outcome(self, mode: str, pieces: Sequence[Future[Scored]]) -> Outcome:
        if any(piece.cancelled() or piece.exception() is not None for piece in pieces):
            return Failure.MODEL
        try:
            return judge(mode, [piece.result() for piece in pieces], self._loaded())
        except (ArithmeticError, LookupError):  # no number, or not in the modes that were asked for
            return Failure.MODEL

    def _leave(self, key: Key, pending: _Pending, future: Future[Outcome]) -> None:
        """Somebody waits no longer; where nobody does, the model need not go on."""
        with self._lock:
            if future not in pending.waiting:
                return
            pending.waiting.remove(future)
            is_wanted = bool(pending.waiting)
            if not is_wanted and self._pending.get(key) is pending:
                del self._pending[key]  # who asks from now on asks anew
        if not is_wanted:
            for piece in pending.pieces:
                piece.cancel()

    def _verdict(self, outcome: Outcome, mode: str, start: float) -> Verdict:
        verdict = Verdict(
            decision=None,
            status=Status.TIMEOUT if outcome is Failure.TIMEOUT else Status.ERROR,
            failure=outcome if isinstance(outcome, Failure) else None,
            mode=mode,
            latency_ms=1000 * (time.perf_counter() - start),
            model=self.name,
            threshold_version=self.threshold_version,
        )
        if isinstance(outcome, Failure):
            return verdict
        return replace(
            verdict,
            decision=outcome.decision,
            status=Status.TRUNCATED if outcome.is_truncated else Status.OK,
            p_malicious=outcome.p_malicious,
            score=outcome.score,
            threshold=outcome.threshold,
            reason=outcome.reason,
            escalated=outcome.escalated,
        )


def _give(future: Future[Outcome], outcome: Outcome) -> None:
    """Resolve a future that its owner may have cancelled."""
    if future.set_running_or_notify_cancel():
        future.set_result(outcome)


def _wait(future: Future[Outcome], seconds: float) -> Outcome:
    try:
        return future.result(timeout=max(0.0, seconds))
    except FutureTimeout:
        future.cancel()
        return Failure.TIMEOUT
