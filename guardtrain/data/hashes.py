"""Which texts a guard was trained on, without the texts: 8-byte digests beside `guard.json`.

A digest tells whether a text that one already holds was there; a text cannot be read back from it. It is not a secret:
whoever guesses a short prompt can check the guess.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guardtrain.data.keys import normalised
from guardtrain.errors import DataError

HASHES_FILE = "training_rows.json"  # a text, as all that lies beside weights and goes with them into an export
FORMAT = 1
DIGEST_BYTES = 8  # a foreign text hits one of a million digests once in 2e13 times


@dataclass(frozen=True)
class RowHashes:
    """digests_N: uint64, ascending, each once."""

    digests_N: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> RowHashes:
        """The digests of the normalised texts."""
        return cls(np.unique(_digests(texts)))

    def contains(self, texts: Sequence[str]) -> np.ndarray:
        """Which texts are, once normalised, among the rows: bool, shape (N,). Reworded ones are not seen."""
        found_N: np.ndarray = np.isin(_digests(texts), self.digests_N)
        return found_N

    def write(self, folder: Path) -> None:
        """Write `training_rows.json` into `folder`, whole or not at all: the digests big-endian, in base64."""
        digests = base64.b64encode(self.digests_N.astype(">u8").tobytes()).decode("ascii")
        partial = folder / f".{HASHES_FILE}.tmp"
        partial.write_text(json.dumps({"format": FORMAT, "digests": digests}) + "\n", encoding="utf-8")
        partial.replace(folder / HASHES_FILE)

    @classmethod
    def read(cls, folder: Path) -> RowHashes:
        """The digests in `folder`. Raises DataError when there are none, or they are broken or of a newer format."""
        path = folder / HASHES_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise DataError("unknown format", where=str(path), expected=str(FORMAT), found=str(raw["format"]))
            digests_N = np.frombuffer(base64.b64decode(raw["digests"], validate=True), dtype=">u8").astype(np.uint64)
        except FileNotFoundError as error:
            raise DataError("no digests of the training rows", where=str(path), hint="older guards have none") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError("broken digests of the training rows", where=str(path), found=str(error)) from error
        if (digests_N[1:] <= digests_N[:-1]).any():
            raise DataError("broken digests of the training rows", where=str(path), expected="ascending numbers")
        return cls(digests_N)


def _digests(texts: Iterable[str]) -> np.ndarray:
    """uint64, shape (N,); the same on every machine."""
    raw = b"".join(hashlib.blake2b(normalised(text).encode(), digest_size=DIGEST_BYTES).digest() for text in texts)
    return np.frombuffer(raw, dtype=">u8").astype(np.uint64)
