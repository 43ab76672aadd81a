"""What encoded and invisible runs of a text say: base64, hexadecimal, rot13, tag characters, variation selectors, overrides.

A decoded part is data like the text it came from: more for a guard to read, never an instruction to this program. Depth one:
what a decoded part may itself encode stays encoded.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

MIN_DECODED_LETTERS = 6  # shorter finds are chance, or carry no order
MIN_ROT13_WORDS = 4
MIN_COMMON_WORDS = 3  # different ones: KB, MB, GB, TB is XO, ZO, to, go

_BASE64 = re.compile(r"(?:[A-Za-z0-9+/_-]{16,}+\r?\n)*+[A-Za-z0-9+/_-]{12,}+={0,2}")
_HEX = re.compile(r"(?:(?:\\x|0x|%)?+[0-9A-Fa-f]{2}[ \t:,;-]{0,2}+(?![0-9A-Fa-f](?![0-9A-Fa-f]))){8,}+")
_HEX_PAIR = re.compile(r"(?:\\x|0x|%)?([0-9A-Fa-f]{2})")
_SENTENCE = re.compile(r"[^.!?:;\n\"'“”«»()\[\]]+")
_WORD = re.compile(r"[A-Za-z]+")
_TAGS = re.compile(r"[\U000E0020-\U000E007E]+")
_SELECTORS = re.compile(r"[\uFE00-\uFE0F\U000E0100-\U000E01EF]{4,}")
_OVERRIDDEN = re.compile("\u202e([^\u202c\u2069\n]+)")

# Common English words and those of orders, without pairs that rot13 turns into each other (be and or).
_COMMON_WORDS = """
    a i how do the to of and in is it you that was for on are with as his they at this have from by had not but what all were
    we when your can there use each which their if will up other about out many then them these so some her would make like
    him into time has look two more write go see no way could people my than been who its now find down did get come made may
    me ignore instructions rules prompt tell show give every before
"""
_COMMON = frozenset(_COMMON_WORDS.split())


def decoded_parts(text: str) -> list[str]:
    """The plain text of every base64, hexadecimal and rot13 run in `text`, in this order. Linear time, never raises.

    A run counts where it decodes to printable text with at least six letters, a rot13 run where a quarter of its words are then
    common English ones. Decoded, all parts together are at most 2.25 times as long as `text`.
    """
    found = [*_decoded_hex(text), *_decoded_base64(text), *_decoded_rot13(text)]
    return list(dict.fromkeys(found))


def hidden_parts(text: str) -> list[str]:
    """What no reader sees as stored: tag characters as ASCII, bytes in variation selectors, overridden runs as displayed."""
    tags = ("".join(chr(ord(tag) - 0xE0000) for tag in run[0]) for run in _TAGS.finditer(text))
    bytes_in_selectors = (_printable(bytes(map(_selector_byte, run[0]))) for run in _SELECTORS.finditer(text))
    overridden = (run[1][::-1] for run in _OVERRIDDEN.finditer(text))
    return [part for part in (*tags, *bytes_in_selectors, *overridden) if part and _has_letters(part)]


def _decoded_hex(text: str) -> Iterator[str]:
    for run in _HEX.finditer(text):
        part = _printable(bytes.fromhex("".join(_HEX_PAIR.findall(run[0]))))
        if part is not None:
            yield part


def _decoded_base64(text: str) -> Iterator[str]:
    for run in _BASE64.finditer(text):
        letters = re.sub(r"[\r\n=]", "", run[0]).replace("-", "+").replace("_", "/")
        try:
            part = _printable(base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True))
        except binascii.Error:  # a length that no encoder writes
            continue
        if part is not None:
            yield part


def _decoded_rot13(text: str) -> Iterator[str]:
    for run in _SENTENCE.finditer(text):
        words = [word.lower() for word in _WORD.findall(run[0])]
        common = [word for word in map(_rot13, words) if word in _COMMON]
        if 4 * len(common) >= len(words) >= MIN_ROT13_WORDS and len(set(common)) >= MIN_COMMON_WORDS:
            yield _rot13(run[0]).strip()


def _rot13(text: str) -> str:
    return text.translate(_ROT13)


_UPPER, _LOWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
_ROT13 = str.maketrans(_UPPER + _LOWER, _UPPER[13:] + _UPPER[:13] + _LOWER[13:] + _LOWER[:13])


def _selector_byte(selector: str) -> int:
    """VS1 to VS256 as 0 to 255, the usual way to smuggle bytes behind one visible character."""
    code = ord(selector)
    return code - 0xFE00 if code < 0xE0100 else code - 0xE0100 + 16


def _printable(data: bytes) -> str | None:
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None
    is_text = all(character.isprintable() or character in "\t\r\n" for character in text)
    return text if is_text and _has_letters(text) else None


def _has_letters(text: str) -> bool:
    return sum(character.isalpha() for character in text) >= MIN_DECODED_LETTERS
