"""What chat servers answer, in every spelling, and what is no verdict."""

from __future__ import annotations

from typing import Any

import pytest

from guardtrain.serve.backend import NoAnswer
from guardtrain.serve.chat import read_choice
from guardtrain.types import Label

LABELS = {Label.MALICIOUS: " mal", Label.BENIGN: " benign"}
REASON = "It asks for the rules."


def entry(token: str, **likeliest: float) -> dict[str, Any]:
    top = [{"token": f" {name}", "logprob": value} for name, value in likeliest.items()]
    return {"token": token, "logprob": -0.1, "top_logprobs": top}


def answer(message: dict[str, Any], tokens: tuple[str, ...] = ("\n", "Ver", "dict", ":"), **likeliest: float) -> dict[str, Any]:
    top = likeliest or {"mal": -0.25, "benign": -1.75}
    entries = [*map(entry, (*REASON.split(), *tokens)), entry(" mal", **top), entry("icious")]
    return {"choices": [{"message": {"role": "assistant", **message}, "logprobs": {"content": entries}}]}


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Verdict: malicious", "reasoning_content": REASON},
        {"content": "\n\nVerdict: malicious", "reasoning": REASON},
        {"content": "Verdict: malicious", "reasoning": REASON, "reasoning_content": None},
        {"content": f"<think>{REASON}</think>\nVerdict: malicious"},
        {"content": f"<think>\n{REASON}\n</think>\n\nVerdict: malicious", "reasoning": None},
    ],
    ids=["reasoning_content", "reasoning", "both-names", "own-tags", "native-tags"],
)
def test_the_reason_is_found_in_either_field_or_in_the_content(message: dict[str, Any]) -> None:
    assert read_choice(answer(message), LABELS) == (REASON, pytest.approx(1.5))


@pytest.mark.parametrize(
    "message",
    [
        {"content": "I cannot say."},
        {"content": None, "reasoning": REASON},
        {"content": "Verdict: malicious\nVerdict: benign", "reasoning": REASON},
        {"content": "Verdict: benign", "reasoning": "Verdict: malicious"},
        {"content": f"<think>{REASON}</think>\nVerdict: benign", "reasoning": REASON},
        {"content": f"{REASON}</think>\nVerdict: benign"},
        {"content": "verdict: maybe", "reasoning": REASON},
    ],
    ids=["talk", "cut", "two", "forged", "twice", "half", "other-word"],
)
def test_what_is_not_one_clear_verdict_is_none(message: dict[str, Any]) -> None:
    with pytest.raises(NoAnswer):
        read_choice(answer(message), LABELS)


def test_no_score_is_made_up() -> None:
    message = {"content": "Verdict: malicious", "reasoning": REASON}
    with pytest.raises(NoAnswer, match="of a label"):
        read_choice(answer(message, mal=-0.25, other=-1.0), LABELS)
    with pytest.raises(NoAnswer, match="no verdict with"):
        read_choice(answer(message, tokens=("\n", "Decision", ":")), LABELS)
    for broken in ({}, {"choices": []}, {"choices": [{"message": message}]}, [], "text", None):
        with pytest.raises(NoAnswer, match="no verdict with"):
            read_choice(broken, LABELS)
