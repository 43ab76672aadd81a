"""What makes two rows the same, and a draw that does not depend on the order of rows or on Python's hash seed."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from guardtrain.types import Example, GuardExample, prompt_text

RANK_BITS = 64


def example_text(example: Example) -> str:
    """The text that decides whether two rows are duplicates: the prompt, or the whole conversation."""
    return prompt_text(example.prompt if isinstance(example, GuardExample) else example.turns)


def prompt_texts(examples: Iterable[GuardExample]) -> list[str]:
    """The text of each prompt, as rows are compared."""
    return [prompt_text(example.prompt) for example in examples]


def label_of(example: Example) -> str:
    """The class of a row; conversations have none."""
    return example.label.value if isinstance(example, GuardExample) else ""


def pair_of(example: Example) -> str:
    """The name of the row's minimal pair, or nothing."""
    return example.pair if isinstance(example, GuardExample) else ""


def normalised(text: str) -> str:
    """NFKC, casefold, collapsed whitespace: texts with equal results are exact duplicates."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def row_key(example: Example) -> str:
    """The identity of a row by content, so that it survives reordered files."""
    return f"{normalised(example_text(example))}\0{label_of(example)}\0{example.id}"


def seeded_rank(seed: int, key: str) -> int:
    """A place in a draw, in [0, 2**RANK_BITS): uniform over seeds, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=RANK_BITS // 8).digest(), "big")
