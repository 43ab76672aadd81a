"""The tree of a pack, by hand and against naive implementations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardtrain.data.collate import block_layout, collate, tree_mask
from guardtrain.data.packing import Pack, Segment, ancestors, layout, plan_packs

# --- planning

lengths_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(lengths=lengths_strategy, budget=st.integers(20, 200), multiple=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_row_exactly_once_within_the_budget(lengths: list[int], budget: int, multiple: int, seed: int) -> None:
    num_packs = len(plan_packs(lengths, budget, seed=seed))
    if -(-num_packs // multiple) * multiple > len(lengths):
        with pytest.raises(ValueError, match="cannot fill a multiple"):
            plan_packs(lengths, budget, num_packs_multiple=multiple, seed=seed)
        return
    packs = plan_packs(lengths, budget, num_packs_multiple=multiple, seed=seed)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert len(packs) == -(-num_packs // multiple) * multiple
    assert all(packs)
    for pack in packs:
        assert sum(lengths[row] for row in pack) <= budget or len(pack) == 1


def test_packs_are_nearly_full() -> None:
    lengths = [7 + 13 * index % 90 for index in range(2000)]
    packs = plan_packs(lengths, 500)
    assert sum(lengths) / (len(packs) * 500) > 0.97


@given(lengths=lengths_strategy, budget=st.integers(20, 200), seed=st.integers(0, 9))
def test_planning_equals_a_naive_best_fit(lengths: list[int], budget: int, seed: int) -> None:
    """In the shuffled order, each row goes into the fullest pack that has room for it, else into a new one."""
    (order,) = plan_packs(lengths, 10**9, seed=seed)
    naive: list[list[int]] = []
    for row in order:
        rooms = [budget - sum(lengths[other] for other in pack) for pack in naive]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            naive[min(fitting)[1]].append(row)
        else:
            naive.append([row])
    packs = plan_packs(lengths, budget, seed=seed)
    if len(packs) <= 64:  # more packs than that are not kept open
        assert sorted(packs) == sorted(naive)


def test_a_seed_gives_one_plan_and_another_seed_another() -> None:
    lengths = list(range(1, 60))
    assert plan_packs(lengths, 100, seed=1) == plan_packs(lengths, 100, seed=1)
    assert plan_packs(lengths, 100, seed=1) != plan_packs(lengths, 100, seed=2)


def test_a_pack_is_a_random_sample_of_the_rows() -> None:
    """Rows come sorted by source and label; no pack may hold one stretch of them."""
    packs = plan_packs([10] * 400, 200, seed=5)
    assert all(max(pack) - min(pack) > 100 for pack in packs)


def test_too_few_rows_for_the_multiple_and_no_rows_at_all() -> None:
    with pytest.raises(ValueError, match="3 rows cannot fill a multiple of 4 packs"):
        plan_packs([1, 1, 1], 100, num_packs_multiple=4)
    assert plan_packs([], 100, num_packs_multiple=4) == []


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    packs = plan_packs([300, 5, 5, 300], 100)
    assert sorted(sorted(pack) for pack in packs) == [[0], [1, 2], [3]]


# --- layout


def test_layout_by_hand() -> None:
    """policy(2) -> prompt(3) -> {off(2), on(3)}; policy -> prompt(1) -> off(2); a second root of two."""
    off, on = Segment([20, 21], [0.0, 5.0]), Segment([30, 31, 32], [1.0, 1.0, 5.0])
    policy = Segment.unsupervised(
        [1, 2], [Segment.unsupervised([10, 11, 12], [off, on]), Segment.unsupervised([13], [Segment([22, 23], [5.0, 1.0])])]
    )
    pack = layout([policy, Segment([40, 41], [0.0, 1.0])])
    assert pack.input_ids_T.tolist() == [1, 2, 10, 11, 12, 20, 21, 30, 31, 32, 13, 22, 23, 40, 41]
    assert pack.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 2, 3, 4, 0, 1]
    assert pack.segment_ids_T.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 5, 5, 6, 6]
    assert pack.parents_S.tolist() == [-1, 0, 1, 1, 0, 4, -1]
    # off: only token 21, from its neighbour; on: its first token from the prompt's last (index 4), as in training alone
    assert pack.sources_N.tolist() == [5, 4, 7, 8, 10, 11, 13]
    assert pack.targets_N.tolist() == [21, 30, 31, 32, 22, 23, 41]
    assert pack.weights_N.tolist() == [5, 1, 1, 5, 5, 1, 1]
    assert pack.last_tokens_S.tolist() == [1, 4, 6, 9, 10, 12, 14]
    assert len(pack) == len(policy) + 2 == 15


def test_dtypes_are_those_that_torch_indexes_with() -> None:
    pack = layout([Segment([1, 2], [0.0, 1.0])])
    arrays = (pack.input_ids_T, pack.position_ids_T, pack.segment_ids_T, pack.parents_S, pack.sources_N, pack.targets_N)
    assert {array.dtype for array in arrays} == {np.dtype("int64")}
    assert pack.weights_N.dtype == np.float32


def test_the_first_token_of_a_root_cannot_be_supervised() -> None:
    with pytest.raises(ValueError, match="nothing that predicts it"):
        layout([Segment([1, 2], [1.0, 1.0])])
    with pytest.raises(ValueError, match="nothing that predicts it"):
        layout([Segment.unsupervised([5]), Segment([1], [1.0])])


def test_weights_and_tokens_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        layout([Segment([1, 2], [0.0])])


def test_concatenated_parts() -> None:
    segment = Segment.concatenated([([1, 2], 0.0), ([3], 10.0), ([4], 1.0)])
    assert (segment.input_ids, segment.weights) == ([1, 2, 3, 4], [0.0, 0.0, 10.0, 1.0])


def segments(depth: int) -> st.SearchStrategy[Segment]:
    tokens = st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 1.0, 10.0])), min_size=1, max_size=4)
    children = st.lists(segments(depth - 1), max_size=3).map(tuple) if depth else st.just(())
    return st.builds(lambda pairs, below: Segment([t for t, _ in pairs], [w for _, w in pairs], below), tokens, children)


def unsupervised_start(root: Segment) -> Segment:
    return Segment(root.input_ids, [0.0, *root.weights[1:]], root.children)


trees = st.lists(segments(3).map(unsupervised_start), min_size=1, max_size=3)


def walk(root: Segment, path: tuple[int, ...] = (), name: tuple[int, ...] = ()) -> Iterator[Any]:
    """(all tokens before it on its path, token, weight, name of its segment) of every token, depth first. Written to be read."""
    for token, weight in zip(root.input_ids, root.weights, strict=True):
        yield path, token, weight, name
        path = (*path, token)
    for number, child in enumerate(root.children):
        yield from walk(child, path, (*name, number))


@given(roots=trees)
def test_layout_equals_a_naive_walk(roots: list[Segment]) -> None:
    naive = [item for number, root in enumerate(roots) for item in walk(root, (), (number,))]
    pack = layout(roots)
    assert pack.input_ids_T.tolist() == [token for _, token, _, _ in naive]
    assert pack.position_ids_T.tolist() == [len(path) for path, _, _, _ in naive]
    assert len(pack) == sum(map(len, roots))
    supervised = [(path, token, weight) for path, token, weight, _ in naive if weight > 0]
    mask_TT = tree_mask(pack)
    seen_by_source = [tuple(pack.input_ids_T[mask_TT[source]].tolist()) for source in pack.sources_N]
    got = list(zip(seen_by_source, pack.targets_N.tolist(), pack.weights_N.tolist(), strict=True))
    assert got == supervised  # the output that predicts a token has seen exactly what comes before it on its path


@given(roots=trees)
def test_the_mask_equals_an_ancestor_walk(roots: list[Segment]) -> None:
    """O(T²), one token pair at a time, on segment names alone: j's name must be a beginning of i's."""
    names = [name for number, root in enumerate(roots) for _, _, _, name in walk(root, (), (number,))]
    naive = [[j <= i and names[i][: len(names[j])] == names[j] for j in range(len(names))] for i in range(len(names))]
    assert tree_mask(layout(roots)).tolist() == naive


@given(roots=trees)
def test_ancestors_and_last_tokens(roots: list[Segment]) -> None:
    pack = layout(roots)
    is_ancestor_SS = ancestors(pack.parents_S)
    for segment, parent in enumerate(pack.parents_S.tolist()):
        chain = {segment}
        while parent >= 0:
            chain.add(parent)
            parent = int(pack.parents_S[parent])
        assert set(np.flatnonzero(is_ancestor_SS[segment]).tolist()) == chain
        assert np.flatnonzero(pack.segment_ids_T == segment)[-1] == pack.last_tokens_S[segment]


# --- collate


def test_collate_shapes() -> None:
    pack: Pack = layout([Segment([1, 2, 3], [0.0, 1.0, 2.0])])
    batch = collate([pack])
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items() if name != "layout"}
    assert shapes == {"input_ids": (1, 3), "position_ids": (1, 3), "sources": (2,), "targets": (2,), "weights": (2,)}
    assert batch["layout"]["root_tokens"] == 0
    assert [mask.tolist() for mask in batch["layout"]["masks"]] == [[[True, False, False], [True, True, False], [True] * 3]]


shared_root = segments(3).filter(lambda root: root.children).map(lambda root: [unsupervised_start(root)])


@given(roots=trees | shared_root, block_tokens=st.integers(1, 40))
def test_blocks_are_the_tree_mask_cut_into_whole_rows(roots: list[Segment], block_tokens: int) -> None:
    pack = layout(roots)
    blocks = block_layout(pack, block_tokens)
    root, sizes = blocks["root_tokens"], blocks["block_tokens"]
    rebuilt_TT = np.zeros((len(pack), len(pack)), dtype=bool)
    rebuilt_TT[:root, :root] = np.tri(root, dtype=bool)
    start = root
    for size, mask in zip(sizes, blocks["masks"], strict=True):
        assert mask.shape == (size, root + size)
        rebuilt_TT[start : start + size, :root] = mask[:, :root]
        rebuilt_TT[start : start + size, start : start + size] = mask[:, root:]
        start += size
    assert start == len(pack)
    assert np.array_equal(rebuilt_TT, tree_mask(pack))
    assert root == (len(roots[0].input_ids) if len(roots) == 1 and roots[0].children else 0)
    rows = list(roots[0].children) if root else roots
    assert all(size >= block_tokens for size in sizes[:-1])
    assert all(size < block_tokens + max(map(len, rows)) for size in sizes)  # closed as soon as it is large enough


def test_collate_takes_one_pack() -> None:
    pack = layout([Segment.unsupervised([1, 2])])
    with pytest.raises(ValueError, match="too many values"):
        collate([pack, pack])
