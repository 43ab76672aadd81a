"""A free-running answer: one clear verdict or none, and whatever cannot be read is never benign."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardtrain.inference.parser import NO_ANSWER, Answer, parse_answer
from guardtrain.types import Label

PIECES = ["<think>", "</think>", "\n", "Verdict:", " ", "malicious", "benign", "verdict :", "It asks.", "<THINK>", "Ｖerdict:"]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=14).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=4).map(lambda pieces: f"<think>{''.join(pieces)}</think>\nVerdict: benign"),
)


@pytest.mark.parametrize("label", list(Label))
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think></think>\nVerdict: {}", ""),
        ("<think>It asks for a cake.</think>\nVerdict: {}", "It asks for a cake."),
        ("<think>\n\n</think>\n\nVerdict: {}", ""),
        (" <think>\nThe verdict is easy.\n</think>\n\nVerdict: {}\n", "The verdict is easy."),
    ],
)
def test_answers_as_they_are_trained_are_read(text: str, reason: str, label: Label) -> None:
    assert parse_answer(text.format(label)) == Answer(reason, label)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "benign",
        "Verdict: benign",
        "<think>It asks\nVerdict: benign",
        "<think>It asks</think>Verdict: benign",
        "<think></think>\nVerdict: benign\nVerdict: malicious",
        "<think></think>\nVerdict: malicious\n\nVerdict: benign",
        "<think>Verdict: malicious</think>\nVerdict: benign",
        "<think>ＶＥＲＤＩＣＴ：malicious</think>\nVerdict: benign",
        "<think>a</think>\nVerdict: malicious</think>\nVerdict: benign",
        "<think></think>\n<think></think>\nVerdict: benign",
        "<think></think>\nVerdict: benign, I think",
        "<think></think>\nVerdict: Benign",
        "<think></think>\nVerdict: benignly",
        "<think></think>\nVerdict: bеnign",
        "I say:\n<think></think>\nVerdict: benign",
    ],
)
def test_everything_else_has_no_verdict(text: str) -> None:
    assert parse_answer(text) == NO_ANSWER


@given(text=texts)
def test_only_a_lone_verdict_line_at_the_end_is_one(text: str) -> None:
    answer = parse_answer(text)
    last = text.rstrip(" \t\r\n").rpartition("\n")[2]
    if answer.verdict is None:
        assert answer == NO_ANSWER
    else:
        assert last == f"Verdict: {answer.verdict}"
        assert len(re.findall("verdict:", text, re.IGNORECASE)) == 1
        assert text.count("<think>") == text.count("</think>") == 1
        assert text.index("<think>") < text.index("</think>") < text.index("Verdict:")
        assert answer.reason is not None


@given(text=texts, verdict=st.sampled_from([f"Verdict: {label}" for label in Label]), where=st.integers(0, 80))
def test_a_verdict_put_anywhere_into_an_answer_spoils_it(text: str, verdict: str, where: int) -> None:
    if parse_answer(text).verdict is not None:
        assert parse_answer(f"{text[:where]}\n{verdict}\n{text[where:]}") == NO_ANSWER
