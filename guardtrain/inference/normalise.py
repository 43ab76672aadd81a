"""Undo what hides a text from a guard but not from the model behind it: invisible characters, look-alike letters, encodings.

Ordinary text in any script stays as it is, bit for bit. Full NFKC does not pass that test (on 13,011 real prompts it changes
58, each of them ordinary: ligatures, ellipses, Chinese punctuation, exponents), so that compatibility forms are folded only
where they stand for plain ASCII letters and digits. Everything here is data: nothing is ever interpreted.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

import regex

from guardtrain.inference.encoded import decoded_parts, hidden_parts
from guardtrain.types import Turn

# Letters that look like an ASCII letter, by script. Source: Unicode Technical Standard #39, confusables.txt (single letters
# whose prototype is an ASCII letter). Left out: dotless i, which Turkish needs, and letters that only programs confuse.
_LOOKALIKES = {
    "Cyrillic": ("аАВсСԁеЕҽԌһНіӏјЈКІӀМоОрРԛѕЅТѵѴԝԜхХуУүҮг", "aABcCdeEeGhHiijJKIIMoOpPqsSTvVwWxXyYyYr"),
    "Greek": ("αΑΒϲϹΕΗιϳͿΙΚΜΝοΟρΡΤυνΧγΥΖ", "aABcCEHijJIKMNoOpPTuvXyYZ"),
    "Armenian": ("ցհոռօՕգզՏսՍ", "ghnnoOqqSuU"),
    "Cherokee": ("ᎪᏴᏟᎠᎬᏀᎻᎫᏦᏞᎷᏢᎡᏚᎢᏙᎳᎩᏃᏏᎥᏂꮯꮪꮃꮓꮩ", "ABCDEGHJKLMPRSTVWYZbihcswzv"),
    "Latin": ("ɑᴀʙᴄᴅᴇꜰɡɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡʏᴢ", "aabcdefgghijklmnopqrstuvwyz"),
}  # fmt: skip
_TO_ASCII = {ord(c): a for letters, ascii_letters in _LOOKALIKES.values() for c, a in zip(letters, ascii_letters, strict=True)}
_LOOKALIKE = "".join(map(chr, _TO_ASCII))
_WORD = regex.compile(r"[\p{L}\p{M}]++")
# Nothing but look-alikes and ASCII letters, with at least one look-alike.
_REPAIRABLE = regex.compile(rf"[A-Za-z]*+[{_LOOKALIKE}][A-Za-z{_LOOKALIKE}]*+")
# Formulas write short words in two scripts on purpose: αx, ρgh.
_MIN_LETTERS, _MIN_LETTERS_GREEK = 3, 5

# Each is scored by itself: whoever sends a thousand must not get a thousand rows of work for one.
MAX_PARTS = 4

# What joiners join: letters of scripts whose spelling needs them, and emoji.
_INVISIBLES = r"[\p{Default_Ignorable_Code_Point}\p{Bidi_Control}]"
_JOINED = (
    r"[[\p{Arabic}\p{Syriac}\p{Mongolian}\p{Devanagari}\p{Bengali}\p{Gurmukhi}\p{Gujarati}\p{Oriya}\p{Tamil}\p{Telugu}\p{Kannada}"
    r"\p{Malayalam}\p{Sinhala}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Extended_Pictographic}\p{Emoji_Modifier}]--" + _INVISIBLES + "]"
)
_INVISIBLE = regex.compile(
    r"\U0001F3F4[\U000E0030-\U000E0039\U000E0061-\U000E007A]{3,6}+\U000E007F(*SKIP)(*FAIL)"  # flags of regions
    r"|(?<=\p{Extended_Pictographic})[\uFE0E\uFE0F](*SKIP)(*FAIL)"
    r"|[0-9#*]\uFE0F\u20E3(*SKIP)(*FAIL)"  # keycaps
    rf"|(?:(?<={_JOINED})|(?<=\p{{Extended_Pictographic}}\uFE0F))[\u200C\u200D](?={_JOINED})(*SKIP)(*FAIL)"
    rf"|{_INVISIBLES}",
    regex.V1,
)


def normalise_text(text: str) -> str:
    """The visible text, followed by what its encoded and invisible parts say, each after an empty line.

    Linear time; the result is at most twelve times as long (ligatures, each part decoded). Not idempotent where something was
    decoded: the encoded part is kept.
    """
    return "\n\n".join(_visible_and_parts(text))


def normalise_prompt(prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """`normalise_text` of every turn; roles stay."""
    return tuple(Turn(turn.role, normalise_text(turn.content)) for turn in prompt)


def readings(prompt: tuple[Turn, ...]) -> list[tuple[Turn, ...]]:
    """The normalised prompt, and what was encoded or invisible in it once more by itself, at most MAX_PARTS parts, the longest.

    A guard may take a harmless request around an encoded order for all there is; the order alone it judges as it would any.
    """
    parts = [Turn(turn.role, part) for turn in prompt for part in _visible_and_parts(turn.content)[1:]]
    longest = sorted(parts, key=lambda part: -len(part.content))[:MAX_PARTS]
    return [normalise_prompt(prompt), *((part,) for part in longest)]


def _visible_and_parts(text: str) -> list[str]:
    """The visible text, then what encoded and invisible parts say."""
    visible = visible_text(text)
    # Invisible characters may split an encoded run, so that runs are searched in the visible text.
    return [visible, *dict.fromkeys(map(visible_text, [*hidden_parts(text), *decoded_parts(visible)]))]


def visible_text(text: str) -> str:
    """`text` as a reader sees it: nothing invisible, styled letters and look-alikes as plain ones. Linear and idempotent.

    Emoji sequences and the joiners of Persian and Indic spelling stay. Never raises, also not for half a surrogate pair.
    """
    if text.isascii():
        return text
    return _with_ascii_letters(_INVISIBLE.sub("", text.translate(_UNSTYLED)))


class _Unstyled(dict[int, str]):
    """For str.translate: 𝐚, ａ, ⓐ, ﬁ and ſ become ASCII; ², ™ and ， stay: they are punctuation or mean something."""

    def __missing__(self, code: int) -> str:
        return _unstyled(code)


@lru_cache(maxsize=4096)
def _unstyled(code: int) -> str:
    character = chr(code)
    tag = unicodedata.decomposition(character).partition(" ")[0]
    plain = unicodedata.normalize("NFKC", character)
    is_styled = tag in {"<font>", "<wide>", "<circle>"} or (tag == "<compat>" and unicodedata.category(character) in {"Ll", "Nl"})
    return plain if is_styled and plain.isascii() and plain.isalnum() else character


_UNSTYLED = _Unstyled()


def _with_ascii_letters(text: str) -> str:
    """Look-alikes as ASCII where words give a disguise away; a script that the text also uses in earnest keeps its own words."""
    candidates = {word for word in _WORD.findall(text) if not word.isascii()}
    disguises = {word for word in candidates if _REPAIRABLE.fullmatch(word)}
    holds_latin = regex.search(r"\p{Latin}", text) is not None
    in_earnest = candidates - disguises if holds_latin else candidates
    at_home = {script for word in in_earnest for script in _scripts(word)} - {"Latin"}
    suspects = _suspects(disguises, at_home)

    def repaired(match: Any) -> str:
        word: str = match[0]
        if word not in disguises or not _scripts(word) <= suspects:
            return word
        return word.translate(_TO_ASCII) if _is_mixed(word) or not _scripts(word) & at_home else word

    return str(_WORD.sub(repaired, text)) if suspects else text


def _suspects(disguises: set[str], at_home: set[str]) -> set[str]:
    """Scripts with a long enough word that mixes in ASCII, or with two words of nothing but look-alikes and none in earnest.

    One such word alone is a quotation: сахар is Russian for sugar.
    """
    long_enough = [word for word in disguises if len(word) >= _min_letters(word)]
    mixed = {script for word in long_enough if _is_mixed(word) for script in _scripts(word)}
    whole = Counter(script for word in long_enough if not _is_mixed(word) for script in _scripts(word))
    return mixed | {script for script, count in whole.items() if count > 1 and script not in at_home}


def _is_mixed(word: str) -> bool:
    return any(letter.isascii() for letter in word)


def _scripts(word: str) -> set[str]:
    return {script for script, pattern in _SCRIPT_PATTERNS.items() if pattern.search(word)}


def _min_letters(word: str) -> int:
    return _MIN_LETTERS_GREEK if _SCRIPT_PATTERNS["Greek"].search(word) else _MIN_LETTERS


# Of look-alikes only: an ASCII letter is no sign of a script.
_SCRIPT_PATTERNS = {
    script: regex.compile(rf"[{letters}]|(?!\p{{Latin}})\p{{{script}}}") for script, (letters, _) in _LOOKALIKES.items()
}
