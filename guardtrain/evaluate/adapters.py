"""A guard in the shapes that other evaluation kits ask for: GuardBench's `moderate`, any-guardrail's `Guardrail`.

Neither kit is needed to import this module. Written against guardbench 1.0.1 and any-guardrail 0.7.7.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guardtrain.data.turns import BrokenTurns, read_turns
from guardtrain.errors import ConfigError, DataError
from guardtrain.evaluate.runner import EvaluationMode, run_modes, scores_of
from guardtrain.inference.guards import LoadedGuard, load_guard
from guardtrain.types import Turn

Probability = Callable[[float], float]
JUST_OVER_HALF = math.nextafter(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a guard says of one prompt in one mode. p_malicious: in [0, 1]. is_flagged: by the guard's threshold."""

    score: float
    p_malicious: float
    is_flagged: bool
    reason: str | None


class Judge:
    """A guard in one mode, its policy read once.

    model: a guard, or the model argument of one. mode: `both` if absent where the guard was trained in two, else its only one.
    p_malicious: score to probability, as calibration fitted it. Without it sigmoid(score - threshold) is given, which is 0.5
    where the guard begins to flag and is not a probability otherwise.
    """

    def __init__(
        self, model: LoadedGuard | str, mode: EvaluationMode | None = None, p_malicious: Probability | None = None
    ) -> None:
        guard = load_guard(model) if isinstance(model, str) else model
        self.mode: EvaluationMode = mode or _widest_mode(guard)
        self.threshold = guard.settings.thresholds.get(self.mode, 0.0)
        self.name = model if isinstance(model, str) else guard.settings.base_model
        self._p_malicious = p_malicious or self._from_threshold
        self._scorer = guard.scorer()

    def __call__(self, prompts: Sequence[tuple[Turn, ...]]) -> list[Judgement]:
        """One judgement for each prompt, in order."""
        by_index = dict(self._scorer.score(prompts, run_modes([self.mode])))
        scored = [by_index[index] for index in range(len(prompts))]
        return [
            Judgement(score, self._p_malicious(score), score >= self.threshold, row.reason)
            for row, score in zip(scored, scores_of(scored, self.mode).tolist(), strict=True)
        ]

    def _from_threshold(self, score: float) -> float:
        p = 0.5 * (1 + math.tanh((score - self.threshold) / 2))  # the logistic function, without its overflow
        # Kits flag what is over a half, the guard what reaches its threshold.
        return max(p, JUST_OVER_HALF) if score >= self.threshold else p


def guardbench_moderate(
    model: LoadedGuard | str, mode: EvaluationMode | None = None, p_malicious: Probability | None = None
) -> Callable[[list[list[dict[str, str]]]], list[float]]:
    """The function that `guardbench.benchmark(moderate=…)` wants: conversations to probabilities of being unsafe.

    model, mode, p_malicious: see `Judge`. GuardBench counts what is over 0.5 as flagged: give no p_malicious to have its F1
    and recall at the guard's own threshold. Where a set labels the response, the guard reads it as the last turn.
    The function raises DataError for a conversation that cannot be read.
    """
    judge = Judge(model, mode, p_malicious)

    def moderate(conversations: list[list[dict[str, str]]]) -> list[float]:
        prompts = [_turns(number, conversation) for number, conversation in enumerate(conversations, start=1)]
        return [judgement.p_malicious for judgement in judge(prompts)]

    return moderate


def any_guardrail(model: LoadedGuard | str, mode: EvaluationMode | None = None, p_malicious: Probability | None = None) -> Any:
    """The guard as an `any_guardrail.base.Guardrail`: `validate(text)` gives a GuardrailOutput, a list of texts a list.

    model, mode, p_malicious: see `Judge`. valid: not flagged at the guard's threshold; score: p_malicious; explanation: the
    reason, in modes `on` and `both`. Raises ConfigError when any-guardrail is not installed.
    """
    try:
        from any_guardrail import base, taxonomy, types
    except ImportError as error:
        raise ConfigError("any-guardrail is not installed", hint="pip install any-guardrail") from error

    class ReasoningGuard(base.Guardrail):  # type: ignore[misc,unused-ignore]  # untyped where the package is absent
        METADATA = _metadata(taxonomy)

        def __init__(self, judge: Judge) -> None:
            self.model_id, self.judge = judge.name, judge

        def validate(self, input_text: str | list[str]) -> Any:
            """Judge one text, or each of a list, as any-guardrail's own guards do."""
            texts = [input_text] if isinstance(input_text, str) else input_text
            start = time.perf_counter()
            judgements = self.judge([(Turn("user", text),) for text in texts])
            usage = types.GuardrailUsage(model_id=self.model_id, latency_ms=1000 * (time.perf_counter() - start))
            outputs = [
                types.GuardrailOutput(
                    valid=not judgement.is_flagged,
                    explanation=judgement.reason,
                    score=judgement.p_malicious,
                    usage=usage,
                    extra={"score": judgement.score, "threshold": self.judge.threshold, "mode": self.judge.mode},
                )
                for judgement in judgements
            ]
            return outputs[0] if isinstance(input_text, str) else outputs

    return ReasoningGuard(Judge(model, mode, p_malicious))


def _widest_mode(guard: LoadedGuard) -> EvaluationMode:
    modes = guard.settings.modes
    return "both" if len(modes) > 1 else modes[0]  # type: ignore[return-value]  # written by a recipe that was checked


def _turns(number: int, conversation: Any) -> tuple[Turn, ...]:
    try:
        return read_turns(conversation)
    except BrokenTurns as error:
        raise DataError("a conversation that cannot be read", where=f"conversation {number}", found=str(error)) from error


def _metadata(taxonomy: Any) -> Any:
    """What any-guardrail's registry knows of a guardrail; policy and licence are the trained model's own."""
    category = taxonomy.GuardrailCategory
    return taxonomy.GuardrailMetadata(
        description="A reasoning guard: one sentence of reasoning, then a verdict with a calibrated score.",
        display_name="guardtrain",
        categories=frozenset({category.PROMPT_INJECTION, category.CONTENT_SAFETY}),
        primary_category=category.PROMPT_INJECTION,
        stages=frozenset({taxonomy.GuardrailStage.INPUT}),
        output_shapes=frozenset({taxonomy.OutputShape.BINARY, taxonomy.OutputShape.SCORE}),
        backend=taxonomy.BackendType.LOCAL_DECODER,
        supports_batch=True,
        vendor="guardtrain",
        default_license="unknown",
    )
