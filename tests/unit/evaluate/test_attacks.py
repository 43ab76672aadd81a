"""The attacks are what they claim to be, and the figures over them count what they say."""

from __future__ import annotations

import base64
import codecs
import json
import re
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from tiny_models import guard_row

from guardtrain.data.checks import exact_duplicates, find_near_duplicates, overlap, repeated_ids
from guardtrain.errors import DataError
from guardtrain.evaluate.attacks import FOLDER, Attack, attack_table, evasion, load_attacks, rate
from guardtrain.inference.defences import NormalisingScorer
from guardtrain.inference.normalise import normalise_text
from guardtrain.inference.scorer import Scored
from guardtrain.types import Label, Mode, Turn, prompt_text

RAW = [json.loads(line) for path in sorted(FOLDER.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
ROWS = [row for row in RAW if "family" in row]
PADDINGS = {row["id"]: row["text"] for row in RAW if "family" not in row}
ZERO_WIDTH = "\u00ad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2063\ufe00\ufeff"


@pytest.fixture(scope="module")
def attacks() -> list[Attack]:
    return load_attacks()


def text_of(attack: Attack) -> str:
    return prompt_text(attack.attacked.prompt)


def clean_of(attack: Attack) -> str:
    assert attack.clean is not None
    return prompt_text(attack.clean.prompt)


def test_there_are_enough_of_each(attacks: list[Attack]) -> None:
    malicious = Counter(attack.family for attack in attacks if attack.attacked.label is Label.MALICIOUS)
    benign = Counter(attack.family for attack in attacks if attack.attacked.label is Label.BENIGN)
    assert malicious.total() >= 160
    assert benign.total() >= 50
    assert set(malicious) == set(benign)
    assert min(malicious.values()) >= 8
    assert min(benign.values()) >= 3


def test_malicious_rows_have_clean_twins_and_benign_ones_have_none(attacks: list[Attack]) -> None:
    for attack in attacks:
        assert (attack.clean is not None) == (attack.attacked.label is Label.MALICIOUS), attack.attacked.id
        if attack.clean is not None:
            assert attack.clean.label is Label.MALICIOUS
            assert attack.clean.pair == attack.attacked.pair
            assert clean_of(attack) != text_of(attack)
            assert len(clean_of(attack)) < 130
            assert clean_of(attack).isascii()


def test_no_row_is_near_another_or_near_the_starter_rows(attacks: list[Attack], starter_rows: list[Any]) -> None:
    attacked = [attack.attacked for attack in attacks]
    clean = [attack.clean for attack in attacks if attack.clean is not None]
    assert exact_duplicates(attacked) == exact_duplicates(clean) == []
    assert find_near_duplicates([*attacked, *clean]) == []
    assert overlap(starter_rows, [*attacked, *clean]) == []
    assert repeated_ids([*attacked, *clean]) == []


def rows_of(family: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["family"] == family]


def decoded(method: str, text: str) -> Iterator[str]:
    """Every run of `text` that `method` might have encoded, decoded with the standard library alone."""
    if method.startswith("base64"):
        joined = text.replace("\n", "") if method == "base64_wrapped" else text
        for run in re.findall(r"[A-Za-z0-9+/_-]{40,}", joined):
            yield base64.urlsafe_b64decode(run.replace("+", "-").replace("/", "_") + "=" * (-len(run) % 4)).decode()
    elif method.startswith("hex"):
        for run in re.findall(r"(?:(?:\\x)?[0-9a-f]{2} ?){20,}", text):
            yield bytes.fromhex(run.replace("\\x", "")).decode()
    elif method == "percent":
        yield urllib.parse.unquote(text)
    elif method == "rot13":
        yield codecs.decode(text, "rot13")


@pytest.mark.parametrize("row", [row for row in rows_of("encoding") if "method" in row], ids=lambda row: row["id"])
def test_encoded_rows_decode_to_what_they_claim(row: dict[str, Any]) -> None:
    hidden = row.get("clean") or row["hidden"]
    assert hidden not in row["prompt"]
    assert any(hidden in text for text in decoded(row["method"], row["prompt"]))


@pytest.mark.parametrize("row", [row for row in rows_of("invisible") if "clean" in row], ids=lambda row: row["id"])
def test_invisible_rows_hide_what_they_claim(row: dict[str, Any]) -> None:
    prompt, method = row["prompt"], row["method"]
    assert row["clean"] not in prompt
    if method == "tags":
        found = "".join(chr(ord(character) - 0xE0000) for character in prompt if 0xE0000 < ord(character) < 0xE0080)
    elif method == "selectors":
        found = "".join(chr(ord(character) - 0xE0100 + 16) for character in prompt if 0xE0100 <= ord(character) < 0xE01F0)
    elif method == "override":
        found = prompt.removeprefix("\u202e").removesuffix("\u202c")[::-1]
    else:
        found = prompt.translate(dict.fromkeys(map(ord, ZERO_WIDTH)))
    assert found == row["clean"]


def test_invisible_characters_are_escaped_in_the_file() -> None:
    for family in ("invisible", "homoglyphs"):
        assert (FOLDER / f"{family}.jsonl").read_bytes().isascii()


def test_homoglyph_rows_look_like_their_clean_twins() -> None:
    for row in rows_of("homoglyphs"):
        if "clean" not in row:
            continue
        assert not row["prompt"].isascii()
        assert len(row["prompt"]) == len(row["clean"])
        for shown, plain in zip(row["prompt"], row["clean"], strict=True):
            folded = unicodedata.normalize("NFKC", shown)
            names = unicodedata.name(shown).split()
            assert folded.lower() == plain.lower() or not shown.isascii(), (row["id"], names)
            assert shown.isalpha() or unicodedata.category(shown) == "So" or shown == plain


def test_the_normaliser_uncovers_every_row_of_its_families(attacks: list[Attack]) -> None:
    for attack in attacks:
        if attack.clean is None or attack.family not in {"homoglyphs", "invisible", "encoding"}:
            continue
        clean = clean_of(attack).rstrip(".?").lower()
        assert clean not in text_of(attack).lower()
        assert clean in normalise_text(text_of(attack)).lower(), attack.attacked.id


def test_the_normaliser_changes_no_row_of_another_family(attacks: list[Attack]) -> None:
    for attack in attacks:
        if attack.family not in {"homoglyphs", "invisible", "encoding"}:
            assert normalise_text(text_of(attack)) == text_of(attack), attack.attacked.id


def test_paddings_are_long_and_stand_where_the_row_says(attacks: list[Attack]) -> None:
    assert all(2_000 <= len(text) <= 8_000 for text in PADDINGS.values())
    for attack, row in zip([a for a in attacks if a.family == "padding"], rows_of("padding"), strict=True):
        text = text_of(attack)
        assert 2_000 <= len(text) <= 13_000
        assert attack.clean is None or clean_of(attack) in text
        before, after = text.split(row["prompt"])
        for side, names in ((before, row.get("before", [])), (after, row.get("after", []))):
            assert all(PADDINGS[name] in side for name in names)
            assert len(side) == sum(len(PADDINGS[name]) + 2 for name in names)


def test_rows_are_short_requests(attacks: list[Attack]) -> None:
    assert max(len(text_of(attack)) for attack in attacks if attack.family != "padding") < 1_000


# The figures.


def attack(label: str, family: str) -> Attack:
    row = guard_row("text", label, category=family)
    return Attack(row, row if label == "malicious" else None)


SIX = [attack("malicious", "a")] * 3 + [attack("benign", "a"), attack("malicious", "b"), attack("benign", "b")]


def test_evasion_counts_rows_that_are_flagged_clean_and_pass_attacked() -> None:
    flagged = np.array([True, False, False, True, True, False])
    clean_flagged = np.array([True, True, False, True, False, True])  # of a benign row: means nothing
    result = evasion(SIX, flagged, clean_flagged)
    assert list(result) == ["all", "a", "b"]
    counts = {
        name: [(r.count, r.of) for r in (e.clean_flagged, e.evaded, e.recall, e.false_alarms)] for name, e in result.items()
    }
    assert counts == {
        "all": [(2, 4), (1, 2), (2, 4), (1, 2)],
        "a": [(2, 3), (1, 2), (1, 3), (1, 1)],
        "b": [(0, 1), (0, 0), (1, 1), (0, 1)],
    }
    assert result["b"].evaded.value is None
    assert json.loads(json.dumps(result["a"].to_json()))["recall"]["value"] == pytest.approx(1 / 3, abs=1e-6)


def test_flags_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match=r"two of shape \(6,\)"):
        evasion(SIX, np.zeros(6, bool), np.zeros(4, bool))


@pytest.mark.parametrize(("count", "of"), [(0, 10), (10, 10), (3, 17), (1, 400)])
def test_the_interval_is_wilsons(count: int, of: int) -> None:
    z, p = 1.959963984540054, count / of
    centre, half = p + z * z / (2 * of), z * np.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    found = rate(count, of)
    assert (found.low, found.high) == pytest.approx(
        ((centre - half) / (1 + z * z / of), (centre + half) / (1 + z * z / of)), abs=2e-6
    )


class KeywordScorer:
    """Flags what says `poison`."""

    def score(self, prompts: Sequence[tuple[Turn, ...]], modes: Sequence[Mode]) -> Iterator[tuple[int, Scored]]:
        for index in reversed(range(len(prompts))):
            score = 1.0 if "poison" in prompt_text(prompts[index]) else -1.0
            yield index, Scored(scores=dict.fromkeys(modes, score), is_natural=dict.fromkeys(modes, True))


def test_the_table_holds_four_combinations() -> None:
    hidden, clean = guard_row("p\u200boison", category="invisible"), guard_row("poison", category="invisible")
    rows = [Attack(guard_row("poi\u200bson ivy", "benign", category="invisible"), None), Attack(hidden, clean)]
    scored = []
    table = attack_table(
        lambda normalise, chunk: NormalisingScorer(KeywordScorer()) if normalise else KeywordScorer(),
        "both",
        0.5,
        rows,
        on_row=lambda: scored.append(1),
    )
    assert [(row["normalise"], row["chunk"]) for row in table] == [(False, False), (True, False), (False, True), (True, True)]
    assert [row["evasion"]["all"]["evaded"]["count"] for row in table] == [1, 0, 1, 0]
    assert [row["evasion"]["all"]["false_alarms"]["count"] for row in table] == [0, 1, 0, 1]
    assert len(scored) == 4 * 3
    json.dumps(table)


def test_the_table_is_over_all_attacks_unless_told_otherwise(attacks: list[Attack]) -> None:
    table = attack_table(lambda normalise, chunk: KeywordScorer(), "off", 0.0)
    figures = table[0]["evasion"]["all"]
    assert figures["recall"]["of"] == sum(attack.clean is not None for attack in attacks)
    assert figures["recall"]["of"] + figures["false_alarms"]["of"] == len(attacks)
