"""Near-duplicates, exactly: every pair of texts whose word 5-gram sets have a Jaccard similarity of at least 0.8.

An exact join, not MinHash: its answer does not depend on the order of rows or on luck, so that a split built on it is
reproducible. Source: prefix filtering, Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", WWW 2007.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from guardtrain.data.keys import normalised

SHINGLE_WORDS = 5
# At 0.8 one changed word parts two texts of fewer than about 45 words: minimal pairs and short look-alikes stay apart,
# while a long text with another name, number or greeting is found.
NEAR = 0.8

# Scripts without blanks between words count by character.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+")


def words_of(text: str) -> list[str]:
    """The words of a text, normalised and without punctuation; a sign of a script without blanks counts as one."""
    return _WORD.findall(normalised(text))


def shingle_ids(texts: Sequence[str]) -> list[list[int]]:
    """The word 5-grams of each text as sorted integers, the rarest 5-gram of the corpus first.

    A text of fewer than 5 words is one shingle; a text without words has none.
    """
    shingles = [_shingles(text) for text in texts]
    frequency = Counter(shingle for found in shingles for shingle in found)
    by_rarity = {shingle: rank for rank, shingle in enumerate(sorted(frequency, key=lambda item: (frequency[item], item)))}
    return [sorted(by_rarity[shingle] for shingle in found) for found in shingles]


def similar_pairs(
    sets: Sequence[Sequence[int]], threshold: float = NEAR, skip: Callable[[int, int], bool] = lambda a, b: False
) -> Iterator[tuple[int, int]]:
    """Yield each pair of indices whose sets have Jaccard >= threshold and that `skip` does not rule out.

    sets: from `shingle_ids`. skip is asked before a pair is measured, so a caller that joins groups saves the work within
    one group.
    """
    index: dict[int, list[int]] = {}
    members = [frozenset(ids) for ids in sets]
    for a in sorted((i for i in range(len(sets)) if sets[i]), key=lambda i: len(sets[i])):
        least = _at_least(threshold * len(sets[a]))  # a smaller set cannot reach the threshold
        # Two sets over the threshold share an element among the first (size - least + 1) of either.
        prefix = sets[a][: len(sets[a]) - least + 1]
        for b in _candidates(index, prefix, sets, least):
            if not skip(a, b) and _jaccard_at_least(members[a], members[b], threshold):
                yield a, b
        for item in prefix:
            index.setdefault(item, []).append(a)


def _shingles(text: str) -> set[str]:
    words = words_of(text)
    if not words:
        return set()
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _candidates(index: dict[int, list[int]], prefix: Sequence[int], sets: Sequence[Sequence[int]], least: int) -> Iterator[int]:
    seen: set[int] = set()
    for item in prefix:
        for b in reversed(index.get(item, ())):
            if len(sets[b]) < least:  # sets were indexed by growing size
                break
            if b not in seen:
                seen.add(b)
                yield b


def _jaccard_at_least(a: frozenset[int], b: frozenset[int], threshold: float) -> bool:
    shared = len(a & b)
    return shared >= _at_least(threshold * (len(a) + len(b) - shared))


def _at_least(bound: float) -> int:
    return math.ceil(bound - 1e-9)  # 0.8 * 15 must be 12, not 13


class Groups:
    """Union-find over row indices."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        """The representative of the item's group."""
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, a: int, b: int) -> None:
        """Make one group of two."""
        self._parent[self.find(a)] = self.find(b)

    def same(self, a: int, b: int) -> bool:
        """Whether both are in one group."""
        return self.find(a) == self.find(b)

    def members(self) -> list[list[int]]:
        """Every group, members in order, groups by their first member."""
        groups: dict[int, list[int]] = {}
        for item in range(len(self._parent)):
            groups.setdefault(self.find(item), []).append(item)
        return list(groups.values())
