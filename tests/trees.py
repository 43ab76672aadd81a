"""Random trees of segments, and who sees whom in them, written to be read and not to be fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from guardtrain.data.packing import Segment


def segments(depth: int) -> st.SearchStrategy[Segment]:
    """A segment of one to four tokens with up to three children, `depth` levels of them."""
    tokens = st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 1.0, 10.0])), min_size=1, max_size=4)
    children = st.lists(segments(depth - 1), max_size=3).map(tuple) if depth else st.just(())
    return st.builds(lambda pairs, below: Segment([t for t, _ in pairs], [w for _, w in pairs], below), tokens, children)


def unsupervised_start(root: Segment) -> Segment:
    """A root whose first token is not supervised: nothing predicts it."""
    return Segment(root.input_ids, [0.0, *root.weights[1:]], root.children)


trees = st.lists(segments(3).map(unsupervised_start), min_size=1, max_size=3)
shared_root = segments(3).filter(lambda root: root.children).map(lambda root: [unsupervised_start(root)])


def walk(root: Segment, path: tuple[int, ...] = (), name: tuple[int, ...] = ()) -> Iterator[Any]:
    """(all tokens before it on its path, token, weight, name of its segment, is it computed) of every token, depth first."""
    for index, (token, weight) in enumerate(zip(root.input_ids, root.weights, strict=True)):
        is_needed = bool(root.children) or any(root.weights[index + 1 :]) or not any(root.weights)
        yield path, token, weight, name, is_needed
        path = (*path, token)
    for number, child in enumerate(root.children):
        yield from walk(child, path, (*name, number))


def naive_mask(roots: list[Segment], window: int = 0) -> list[list[bool]]:
    """O(T²), one token pair at a time, on segment names alone: j's name must be a beginning of i's.

    window: i sees at most so many tokens of its path, itself included; 0 for all.
    """
    walked = (item for number, root in enumerate(roots) for item in walk(root, (), (number,)))
    tokens = [(name, len(path)) for path, _, _, name, is_computed in walked if is_computed]
    return [
        [
            j <= i and mine[: len(other)] == other and (not window or position - other_position < window)
            for j, (other, other_position) in enumerate(tokens)
        ]
        for i, (mine, position) in enumerate(tokens)
    ]
