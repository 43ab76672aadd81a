"""From what the model said of a prompt's pieces to one decision. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from guardtrain.errors import ConfigError
from guardtrain.inference.calibration import Calibration
from guardtrain.inference.chunks import worst
from guardtrain.inference.scored import Question, Scored
from guardtrain.serve.facts import GuardFacts
from guardtrain.types import Label, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a verdict says of the prompt; see there."""

    score: float
    threshold: float
    p_malicious: float | None
    reason: str | None
    is_truncated: bool
    escalated: bool

    @property
    def decision(self) -> Label:
        """Malicious from the threshold on."""
        return Label.MALICIOUS if self.score >= self.threshold else Label.BENIGN


def modes_of(facts: GuardFacts) -> tuple[str, ...]:
    """The modes in which a guard can be asked: those it was trained in, their mean, and the cascade where it has a band."""
    both = ("both",) if set(facts.modes) == set(Mode) else ()
    return (*facts.modes, *both, *(("cascade",) if both and facts.cascade else ()))


def default_mode(facts: GuardFacts) -> str:
    """The cascade where there is one, else the cheapest."""
    modes = modes_of(facts)
    return "cascade" if "cascade" in modes else min(modes, key=["off", "on", "both"].index)


def check_mode(mode: str, facts: GuardFacts) -> str:
    """`mode`, where the guard has it. Raises ConfigError."""
    if mode not in modes_of(facts):
        hint = "guardtrain calibrate writes its band" if mode == "cascade" else None
        raise ConfigError(
            "the guard has no such mode", where="mode", expected=" or ".join(modes_of(facts)), found=mode, hint=hint
        )
    return mode


def question_of(mode: str, facts: GuardFacts) -> Question:
    """What the model is asked in an evaluation mode."""
    if mode in ("off", "on"):
        return Question(frozenset({Mode(mode)}))
    return Question(frozenset(Mode), facts.cascade if mode == "cascade" else None)


def judge(mode: str, pieces: Sequence[Scored], facts: GuardFacts) -> Judgement:
    """The worst of a prompt's pieces, at the guard's threshold (0 where it has none).

    Raises ArithmeticError where a score is no number: it would pass for benign.
    """
    if not all(math.isfinite(score) for piece in pieces for score in piece.scores.values()):
        raise ArithmeticError("the model gave a score that is no number")
    if mode != "cascade":
        whole = worst(pieces)
        return _judgement(mode, sum(whole.scores.values()) / len(whole.scores), whole, facts)
    judged = [_cascade(piece, facts) for piece in pieces]
    return max(judged, key=lambda each: each.score - each.threshold)


def _cascade(piece: Scored, facts: GuardFacts) -> Judgement:
    """Decided by mode `off` where that was clear, else by the mean of both modes."""
    if Mode.ON in piece.scores:
        return _judgement("both", sum(piece.scores.values()) / 2, piece, facts, escalated=True)
    clear = _judgement("off", piece.scores[Mode.OFF], piece, facts)
    low, high = facts.cascade or (-math.inf, math.inf)
    return replace(clear, threshold=min(max(clear.threshold, low), high))  # where the band does not hold it, the band decides


def _judgement(mode: str, score: float, scored: Scored, facts: GuardFacts, *, escalated: bool = False) -> Judgement:
    known = facts.calibration.modes.get(mode) if facts.calibration else None
    return Judgement(
        score=score,
        threshold=_threshold(mode, facts.calibration),
        p_malicious=known.p_malicious(score) if known else None,
        reason=scored.reason,
        is_truncated=scored.truncated,
        escalated=escalated,
    )


def _threshold(mode: str, calibration: Calibration | None) -> float:
    return calibration.thresholds.get(mode, 0.0) if calibration else 0.0
