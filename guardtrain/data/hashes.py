"""Which texts a guard was trained on, without the texts: 8-byte digests beside `guard.json`.

A digest tells whether a text that one already holds was there; a text cannot be read back from it. It is not a secret:
whoever guesses a short prompt can check the guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guardtrain.data.keys import normalised
from guardtrain.errors import DataError

HASHES_FILE = "training_rows.npy"
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
        """Write `training_rows.npy` into `folder`, whole or not at all."""
        partial = folder / f".{HASHES_FILE}.tmp"
        with partial.open("wb") as file:
            np.save(file, self.digests_N, allow_pickle=False)
        partial.replace(folder / HASHES_FILE)

    @classmethod
    def read(cls, folder: Path) -> RowHashes:
        """The digests in `folder`. Raises DataError when there are none, or they are broken."""
        path = folder / HASHES_FILE
        try:
            digests_N = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError("no digests of the training rows", where=str(path), hint="older guards have none") from error
        except (OSError, ValueError, EOFError) as error:
            raise DataError("broken digests of the training rows", where=str(path), found=str(error)) from error
        if digests_N.dtype != np.uint64 or digests_N.ndim != 1 or (digests_N[1:] <= digests_N[:-1]).any():
            found = f"{digests_N.dtype} of shape {digests_N.shape}"
            raise DataError("broken digests of the training rows", where=str(path), expected="ascending uint64", found=found)
        return cls(digests_N)


def _digests(texts: Iterable[str]) -> np.ndarray:
    """uint64, shape (N,); the same on every machine."""
    raw = b"".join(hashlib.blake2b(normalised(text).encode(), digest_size=DIGEST_BYTES).digest() for text in texts)
    return np.frombuffer(raw, dtype=">u8").astype(np.uint64)
