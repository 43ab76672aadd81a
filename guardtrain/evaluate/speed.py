"""How long a verdict takes in each mode: alone, as a proxy waits for it, and in batches, as an evaluation does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guardtrain.errors import ConfigError
from guardtrain.evaluate.runner import EvaluationMode, ScoresPrompts, needs_calibration, run_modes
from guardtrain.inference.cascade import Cascade
from guardtrain.inference.scored import Prompt


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall clock from a prompt to its verdict, one prompt at a time, the policy cached: median and 95th percentile."""

    p50_seconds: float
    p95_seconds: float


def measure_latency(
    scorer: ScoresPrompts,
    prompts: Sequence[Prompt],
    modes: Sequence[EvaluationMode],
    *,
    rows: int,
    cascade: Cascade | None = None,
) -> dict[EvaluationMode, Latency]:
    """Score the first `rows` prompts one by one in each mode. cascade: its band, for mode `cascade`. Raises ConfigError."""
    prompts = _first(prompts, rows)
    latencies = {}
    for mode in modes:
        _seconds(scorer, prompts[:1], mode, cascade)  # kernels are chosen and memory is taken at the first call
        seconds = [_seconds(scorer, [prompt], mode, cascade) for prompt in prompts]
        p50, p95 = np.percentile(seconds, [50, 95]).tolist()
        latencies[mode] = Latency(p50_seconds=p50, p95_seconds=p95)
    return latencies


def measure_throughput(
    scorer: ScoresPrompts,
    prompts: Sequence[Prompt],
    modes: Sequence[EvaluationMode],
    *,
    rows: int,
    cascade: Cascade | None = None,
) -> dict[EvaluationMode, float]:
    """Rows a second in each mode alone, the first `rows` prompts in the scorer's batches. Raises ConfigError."""
    prompts = _first(prompts, rows)
    rates: dict[EvaluationMode, float] = {}
    for mode in modes:
        _seconds(scorer, prompts[:1], mode, cascade)
        rates[mode] = len(prompts) / _seconds(scorer, prompts, mode, cascade)
    return rates


def _first(prompts: Sequence[Prompt], rows: int) -> Sequence[Prompt]:
    if not prompts or rows < 1:
        raise ConfigError("nothing to time", where="rows", expected="at least one prompt", found=f"{rows} of {len(prompts)}")
    return prompts[:rows]


def _seconds(scorer: ScoresPrompts, prompts: Sequence[Prompt], mode: EvaluationMode, cascade: Cascade | None) -> float:
    if mode == "cascade" and cascade is None:
        raise needs_calibration("modes")
    escalation: dict[str, Any] = {"escalates": cascade.escalates} if mode == "cascade" and cascade else {}
    start = time.perf_counter()
    for _ in scorer.score(prompts, run_modes([mode]), **escalation):
        pass
    return time.perf_counter() - start
