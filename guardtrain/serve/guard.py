"""A guard as a program uses it: load it once, check prompts, get a verdict or a plain word that there is none."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from guardtrain.errors import ConfigError
from guardtrain.serve.verdict import Failure, Status, Verdict
from guardtrain.types import Label, Turn

if TYPE_CHECKING:
    from guardtrain.inference.guards import LoadedGuard


class Guard:
    """Checks prompts with one model in this process, one at a time. Make it with `Guard.load`; it may be shared by threads.

    None of the checking methods raises for what the model, the queue or the clock did: that is a verdict without a decision.
    """

    def __init__(self, loaded: LoadedGuard, name: str, mode: str | None) -> None:
        self._loaded, self.name = loaded, name
        self._scorer = loaded.scorer()
        self._lock = threading.Lock()
        settings = loaded.settings
        self.modes = tuple([*settings.modes, *(["both"] if len(settings.modes) > 1 else [])])
        self.mode = mode or ("off" if "off" in self.modes else self.modes[0])
        if self.mode not in self.modes:
            raise ConfigError("unknown mode", where="mode", expected=" or ".join(self.modes), found=self.mode)
        calibration = settings.calibration
        text = json.dumps(calibration.to_json(), sort_keys=True) if calibration else ""
        self.threshold_version = (
            f"{calibration.date}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}" if calibration else "uncalibrated"
        )
        self.restarts = 0
        self.cache_hits = 0
        self.queue_depth = 0

    @classmethod
    def load(
        cls, model: str | Path, *, mode: str | None = None, backend: str = "transformers", policy: str | None = None
    ) -> Guard:
        """A run, a model folder or a base model. Raises ModelError, ConfigError."""
        from guardtrain.inference.guards import load_guard

        return cls(load_guard(str(model), policy=policy), Path(model).name, mode)

    @property
    def is_ready(self) -> bool:
        """Whether a check would be answered by the model now."""
        return True

    def check(
        self, prompt: str | Sequence[Mapping[str, Any] | Turn], *, mode: str | None = None, timeout_seconds: float | None = None
    ) -> Verdict:
        """Judge a text or a conversation."""
        from guardtrain.types import Mode

        mode = mode or self.mode
        if mode not in self.modes:
            raise ConfigError("unknown mode", where="mode", expected=" or ".join(self.modes), found=mode)
        start = time.perf_counter()
        try:
            turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(_turn(turn) for turn in prompt)
        except (TypeError, KeyError):
            return self._failed(Failure.UNREADABLE, mode, start)
        parts = list(Mode) if mode == "both" else [Mode(mode)]
        with self._lock:
            ((_, scored),) = self._scorer.score([turns], parts)
        score = sum(scored.scores.values()) / len(scored.scores)
        threshold = self._loaded.settings.thresholds.get(mode, 0.0)
        calibration = self._loaded.settings.calibration
        known = calibration.modes.get(mode) if calibration else None
        return Verdict(
            decision=Label.MALICIOUS if score >= threshold else Label.BENIGN,
            status=Status.TRUNCATED if scored.truncated else Status.OK,
            p_malicious=known.p_malicious(score) if known else None,
            score=score,
            threshold=threshold,
            reason=scored.reason,
            mode=mode,
            latency_ms=1000 * (time.perf_counter() - start),
            model=self.name,
            threshold_version=self.threshold_version,
        )

    def check_many(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any] | Turn]],
        *,
        mode: str | None = None,
        timeout_seconds: float | None = None,
    ) -> list[Verdict]:
        """Judge each prompt; verdicts in their order."""
        return [self.check(prompt, mode=mode, timeout_seconds=timeout_seconds) for prompt in prompts]

    async def acheck(
        self, prompt: str | Sequence[Mapping[str, Any] | Turn], *, mode: str | None = None, timeout_seconds: float | None = None
    ) -> Verdict:
        """As `check`, without blocking the event loop; concurrent callers share batches."""
        return await asyncio.to_thread(self.check, prompt, mode=mode, timeout_seconds=timeout_seconds)

    async def acheck_many(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any] | Turn]],
        *,
        mode: str | None = None,
        timeout_seconds: float | None = None,
    ) -> list[Verdict]:
        """As `check_many`."""
        return list(await asyncio.gather(*(self.acheck(each, mode=mode, timeout_seconds=timeout_seconds) for each in prompts)))

    async def explain(self, prompt: str | Sequence[Mapping[str, Any] | Turn], *, timeout_seconds: float | None = None) -> Verdict:
        """The verdict of mode `on`, with its reason: for a text that was blocked without one."""
        return await self.acheck(prompt, mode="on", timeout_seconds=timeout_seconds)

    async def start(self) -> None:
        """Load what `load` left to be loaded; ready when it returns."""

    async def aclose(self) -> None:
        """End what `start` began."""

    def close(self) -> None:
        """As `aclose`."""

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Guard:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def _failed(self, failure: Failure, mode: str, start: float) -> Verdict:
        return Verdict(
            decision=None,
            status=Status.TIMEOUT if failure is Failure.TIMEOUT else Status.ERROR,
            failure=failure,
            mode=mode,
            latency_ms=1000 * (time.perf_counter() - start),
            model=self.name,
            threshold_version=self.threshold_version,
        )


def _turn(turn: Mapping[str, Any] | Turn) -> Turn:
    if isinstance(turn, Turn):
        return turn
    if not isinstance(turn["role"], str) or not isinstance(turn["content"], str):
        raise TypeError
    return Turn(turn["role"], turn["content"])
