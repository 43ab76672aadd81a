"""Figures and foreign texts as people read them.

Prompts, reasons and names come from attackers' data: what does not show, or changes how its neighbours show, is spelled out.
"""

from __future__ import annotations

import re
import unicodedata

DASH = "–"
HEAD, TAIL = 200, 100  # characters of a long text that are shown; attacks like to stand at the end
MOST_MARKS = 3
# Letters and symbols that show nothing, and marks that change the look of the character before.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
_BLANK |= {chr(code) for code in range(0xE0100, 0xE01F0)}
# Where a Markdown reader would see structure, markup, a link or a mention. Numbers of characters are the one escape that means
# the same in a table cell, in a heading and in every dialect.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|#~$!&@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def visible(text: str) -> str:
    """The text on one line, with control, format, blank and stacked characters as ⟨U+200B⟩ and line ends as ⏎."""
    shown, marks = [], 0
    for character in text.replace("\r\n", "\n"):
        marks = marks + 1 if unicodedata.category(character) == "Mn" else 0
        if character == "\n":
            shown.append(" ⏎ ")
        elif _is_hidden(character) or marks > MOST_MARKS:
            shown.append(f"⟨U+{ord(character):04X}⟩")
        else:
            shown.append(character)
    return "".join(shown)


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    is_odd_space = category[0] == "Z" and character != " "
    return category[0] == "C" or is_odd_space or character in _BLANK


def shortened(text: str) -> str:
    """The beginning and the end of a long text, 300 characters of it."""
    left_out = len(text) - HEAD - TAIL
    return text if left_out <= 0 else f"{text[:HEAD]} […{left_out:,} characters…] {text[-TAIL:]}"


def label(text: str, most: int = 30) -> str:
    """A name that fits into a figure."""
    shown = visible(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def markdown(text: str) -> str:
    """Text that a Markdown reader shows as it is, on one line."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", visible(text))


def percent(value: float | None) -> str:
    """0.1234 as 12.3 %."""
    return DASH if value is None else f"{100 * value:.1f} %"


def decimal(value: float | None) -> str:
    """Three digits."""
    return DASH if value is None else f"{value:.3f}".replace("-", "−")


def percent_interval(low: float, high: float) -> str:
    """In per cent, without the sign."""
    return f"({100 * low:.1f} to {100 * high:.1f})".replace("-", "−")


def decimal_interval(low: float, high: float) -> str:
    """Three digits each."""
    return f"({low:.3f} to {high:.3f})".replace("-", "−")


def points(value: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def seconds(value: float | None) -> str:
    """A duration in the unit that suits it."""
    if value is None:
        return DASH
    for unit, size, least in (("h", 3600, 7200), ("min", 60, 120), ("s", 1, 1)):
        if value >= least:
            return f"{value / size:.1f} {unit}"
    return f"{1000 * value:.0f} ms"


def count(number: int, noun: str) -> str:
    """1 row, 1,200 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
