"""From the scores of a prompt's pieces to one decision, where the answer can be counted out."""

from __future__ import annotations

import math
from itertools import permutations

import pytest

from guardtrain.data.template import PlainText
from guardtrain.inference.calibration import Calibration, ModeCalibration
from guardtrain.inference.scored import Scored
from guardtrain.serve.facts import GuardFacts
from guardtrain.serve.judging import default_mode, judge, modes_of
from guardtrain.types import Label, Mode

THRESHOLDS = {"off": 1.0, "on": 2.0, "both": 3.0}
BAND = (-4.0, 2.0)


def facts(modes: tuple[str, ...] = ("off", "on"), cascade: tuple[float, float] | None = BAND) -> GuardFacts:
    known = {mode: ModeCalibration(temperature=1.0, bias=0.0, threshold=each) for mode, each in THRESHOLDS.items()}
    calibration = Calibration(method="rows", date="2026-11-22", modes=known)
    encoder = PlainText('{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', ())
    return GuardFacts(policy="p", modes=modes, calibration=calibration, cascade=cascade, max_prompt_tokens=64, encoder=encoder)


def piece(off: float | None, on: float | None = None, reason: str | None = None) -> Scored:
    scores = {mode: score for mode, score in ((Mode.OFF, off), (Mode.ON, on)) if score is not None}
    return Scored(scores, dict.fromkeys(scores, True), reason)


CLEAR, WORRYING, ALARM = piece(-6.0), piece(0.0, 5.0, "It orders."), piece(0.0, 8.0, "It orders more.")


@pytest.mark.parametrize("pieces", permutations([CLEAR, WORRYING, ALARM]), ids=range(6))
def test_the_worst_piece_decides_a_cascade_wherever_it_stands(pieces: tuple[Scored, ...]) -> None:
    judged = judge("cascade", pieces, facts())
    assert (judged.score, judged.threshold, judged.reason) == (4.0, 3.0, "It orders more.")
    assert judged.escalated
    assert judged.decision is Label.MALICIOUS


def test_pieces_are_compared_by_their_distance_to_the_threshold_that_is_theirs() -> None:
    """An escalated piece with the higher score may still be the harmless one."""
    flagged, passed = piece(2.5), piece(0.0, 5.8, "It asks.")
    for pieces in ([flagged, passed], [passed, flagged]):
        judged = judge("cascade", pieces, facts())
        assert (judged.score, judged.threshold, judged.escalated) == (2.5, 1.0, False)
        assert judged.decision is Label.MALICIOUS


@pytest.mark.parametrize(("mode", "score"), [("off", 0.5), ("on", 4.0), ("both", 2.25)])
def test_of_other_modes_the_highest_of_each_counts(mode: str, score: float) -> None:
    pieces = [piece(0.5, -1.0), piece(-2.0, 4.0)]
    asked = [Scored({key: each.scores[key] for key in _modes(mode)}, each.is_natural) for each in pieces]
    judged = judge(mode, asked, facts())
    assert (judged.score, judged.threshold) == (score, THRESHOLDS[mode])
    assert (judged.decision is Label.MALICIOUS) is (score >= THRESHOLDS[mode])


def _modes(mode: str) -> tuple[Mode, ...]:
    return tuple(Mode) if mode == "both" else (Mode(mode),)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["off", "cascade"])
def test_a_score_that_is_no_number_is_no_verdict(mode: str, score: float) -> None:
    with pytest.raises(ArithmeticError):
        judge(mode, [CLEAR, piece(score)], facts())


def test_a_clear_piece_is_decided_by_the_band_where_that_does_not_hold_the_threshold() -> None:
    assert judge("cascade", [piece(0.5)], facts(cascade=(-4.0, 0.5))).decision is Label.MALICIOUS
    assert judge("cascade", [piece(1.5)], facts(cascade=(1.8, 2.0))).decision is Label.BENIGN


def test_the_modes_of_a_guard() -> None:
    assert modes_of(facts()) == ("off", "on", "both", "cascade")
    assert default_mode(facts()) == "cascade"
    assert default_mode(facts(cascade=None)) == "off"
    assert modes_of(facts(modes=("off",))) == ("off",)
