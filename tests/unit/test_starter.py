"""The starter data keeps the promises that the README makes of it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from guardtrain.config import Source
from guardtrain.data.checks import check_examples, overlap
from guardtrain.data.sources import load_sources
from guardtrain.evaluate.baseline import unigram_scores_by_pair
from guardtrain.types import Label, prompt_text

CATEGORIES = {
    "instruction_override",
    "system_prompt_extraction",
    "roleplay_jailbreak",
    "encoding_obfuscation",
    "indirect_injection_email",
    "indirect_injection_web",
    "indirect_injection_tool",
    "indirect_injection_code",
    "indirect_injection_document",
    "data_exfiltration",
    "tool_abuse",
    "credential_abuse",
    "multi_turn_setup",
    "intrusion",
    "malware",
    "fraud",
    "violence_weapons",
    "self_harm",
    "harassment_hate",
    "disinformation",
    "illegal_trade_privacy",
}


@pytest.fixture(scope="module", params=["starter", "starter-hard"])
def rows(request: pytest.FixtureRequest) -> list[Any]:
    loaded = load_sources([Source(path=request.param)], "guard")
    assert loaded.problems == []
    return loaded.examples


@pytest.fixture(scope="module")
def pairs(rows: list[Any]) -> dict[str, list[Any]]:
    grouped = defaultdict(list)
    for row in rows:
        grouped[row.pair].append(row)
    return grouped


def test_at_least_four_hundred_pairs_of_one_row_each_side(pairs: dict[str, list[Any]]) -> None:
    assert len(pairs) >= 400
    assert all(sorted(row.label for row in twins) == [Label.BENIGN, Label.MALICIOUS] for twins in pairs.values())


def test_every_category_is_there_on_both_sides(rows: list[Any]) -> None:
    counts = Counter((row.category, row.label) for row in rows)
    assert {category for category, _ in counts} == CATEGORIES
    assert min(counts.values()) >= 10


def test_the_check_finds_nothing(rows: list[Any]) -> None:
    assert check_examples(rows, max_prompt_tokens=600, count_tokens=lambda text: len(text.split())) == []


def test_reasons_are_of_the_promised_length_and_name_no_verdict(rows: list[Any]) -> None:
    naming = re.compile(r"\b(malicious|benign|harmful|harmless|safe|unsafe|legitimate|attackers?|dangerous|verdict)\b", re.I)
    lengths = {row.id: len(row.reason.split()) for row in rows}
    assert {row_id: length for row_id, length in lengths.items() if not 12 <= length <= 32} == {}
    assert [row.id for row in rows if naming.search(row.reason)] == []
    assert len({row.reason for row in rows}) == len(rows)


def test_twins_are_of_about_the_same_length(pairs: dict[str, list[Any]]) -> None:
    ratios = []
    for twins in pairs.values():
        short, long = sorted(len(prompt_text(row.prompt)) for row in twins)
        ratios.append(long / short)
    assert sorted(ratios)[len(ratios) // 2] <= 1.3
    assert max(ratios) <= 2


def test_some_rows_are_long_or_have_several_turns(rows: list[Any]) -> None:
    for label in Label:
        side = [row for row in rows if row.label is label]
        assert sum(len(prompt_text(row.prompt).split()) >= 100 for row in side) >= 10
        assert sum(len(row.prompt) > 1 for row in side) >= 20


def test_labels_cannot_be_read_off_the_words(rows: list[Any]) -> None:
    """Five-fold unigram logistic regression, twins in one fold: a higher figure would mean that words give labels away."""
    is_malicious = [row.label is Label.MALICIOUS for row in rows]
    auroc = roc_auc_score(is_malicious, unigram_scores_by_pair(rows))
    assert auroc <= 0.75


def test_the_two_sets_share_no_prompt() -> None:
    """Not even nearly: a guard that learnt from one is measured on the other."""
    plain, hard = (load_sources([Source(path=name)], "guard").examples for name in ("starter", "starter-hard"))
    assert overlap(plain, hard) == []
