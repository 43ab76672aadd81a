"""The tree of a pack, by hand and against naive implementations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import naive_mask, trees, walk

from guardtrain.data.collate import Collator
from guardtrain.data.packing import Pack, Segment, common_beginning, layout, padded, plan_packs

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
    (order,) = plan_packs(lengths, sum(lengths), seed=seed)
    naive: list[list[int]] = []
    for row in order:
        rooms = [budget - sum(lengths[other] for other in pack) for pack in naive]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            naive[min(fitting)[1]].append(row)
        else:
            naive.append([row])
    packs = plan_packs(lengths, budget, seed=seed)
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
    # The last token of every leaf is predicted and not computed.
    assert pack.input_ids_T.tolist() == [1, 2, 10, 11, 12, 20, 30, 31, 13, 22, 40]
    assert pack.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 2, 3, 0]
    assert pack.segment_ids_T.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 5, 6]
    assert pack.parents_S.tolist() == [-1, 0, 1, 1, 0, 4, -1]
    # off: only token 21, from its neighbour; on: its first token from the prompt's last (index 4), as in training alone
    assert pack.sources_N.tolist() == [5, 4, 6, 7, 8, 9, 10]
    assert pack.targets_N.tolist() == [21, 30, 31, 32, 22, 23, 41]
    assert pack.weights_N.tolist() == [5, 1, 1, 5, 5, 1, 1]
    assert len(pack) == len(policy) + 1 == 11


def test_a_leaf_ends_where_its_last_prediction_is_made() -> None:
    chat = Segment([1, 2, 3, 4, 5], [0.0, 1.0, 1.0, 0.0, 0.0])  # the turn's end and a line behind it train nothing
    assert (len(chat), layout([chat]).input_ids_T.tolist(), layout([chat]).targets_N.tolist()) == (2, [1, 2], [2, 3])
    assert len(Segment.unsupervised([1, 2, 3])) == 3  # only read
    pack = layout([Segment.unsupervised([1, 2], [Segment([7], [1.0]), Segment([8, 9], [0.0, 1.0])])])
    assert pack.segment_ids_T.tolist() == [0, 0, 1]  # token 7 is the parent's prediction, and no segment
    assert (pack.sources_N.tolist(), pack.targets_N.tolist()) == ([1, 2], [7, 9])


# --- what branches begin with alike


def test_what_all_branches_begin_with_joins_the_stem() -> None:
    off, on = Segment([20, 21, 22, 9], [0.0, 0.0, 0.0, 5.0]), Segment([20, 21, 30, 9], [1.0, 1.0, 1.0, 5.0])
    row = Segment.unsupervised([10]).continued([off, on])
    assert (row.input_ids, row.weights) == ([10, 20, 21], [0.0, 1.0, 1.0])
    assert row.children == (Segment([22, 9], [0.0, 5.0]), Segment([30, 9], [1.0, 5.0]))


def test_a_lone_branch_joins_whole() -> None:
    below = Segment([4], [1.0])
    assert Segment.unsupervised([1]).continued([Segment([2, 3], [1.0, 2.0], (below,))]) == Segment(
        [1, 2, 3], [0.0, 1.0, 2.0], (below,)
    )


def test_only_a_leaf_is_continued_and_by_something() -> None:
    leaf = Segment.unsupervised([1])
    with pytest.raises(ValueError, match="only a leaf is continued"):
        Segment.unsupervised([1], [leaf]).continued([leaf])
    with pytest.raises(ValueError, match="at least one branch"):
        leaf.continued([])


def test_a_segment_without_tokens_is_refused() -> None:
    """Its children would be predicted by whatever lies before them."""
    with pytest.raises(ValueError, match="a segment without tokens"):
        layout([Segment.unsupervised([1, 2], [Segment.unsupervised([], [Segment([3, 4], [0.0, 1.0])])])])


def test_equal_branches_count_twice_and_stay_branches() -> None:
    branch = Segment([2, 3], [1.0, 2.0])
    row = Segment.unsupervised([1]).continued([branch, branch])
    assert row == Segment([1, 2], [0.0, 2.0], (Segment([3], [2.0]), Segment([3], [2.0])))
    pack = layout([row])
    assert (pack.targets_N.tolist(), pack.weights_N.tolist(), pack.sources_N.tolist()) == ([2, 3, 3], [2, 2, 2], [0, 1, 1])


@given(runs=st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=4))
def test_common_beginning_equals_the_longest_one_that_all_have(runs: list[list[int]]) -> None:
    longest = max((n for n in range(6) if runs and all(len(run) >= n and run[:n] == runs[0][:n] for run in runs)), default=0)
    assert common_beginning(runs) == longest


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


@given(roots=trees)
def test_layout_equals_a_naive_walk(roots: list[Segment]) -> None:
    naive = [item for number, root in enumerate(roots) for item in walk(root, (), (number,))]
    computed = [item for item in naive if item[-1]]
    pack = layout(roots)
    assert pack.input_ids_T.tolist() == [token for _, token, *_ in computed]
    assert pack.position_ids_T.tolist() == [len(path) for path, *_ in computed]
    assert len(pack) == sum(map(len, roots))
    supervised = [(path, token, weight) for path, token, weight, *_ in naive if weight > 0]
    mask_TT = np.array(naive_mask(roots))
    seen_by_source = [tuple(pack.input_ids_T[mask_TT[source]].tolist()) for source in pack.sources_N]
    got = list(zip(seen_by_source, pack.targets_N.tolist(), pack.weights_N.tolist(), strict=True))
    assert got == supervised  # the output that predicts a token has seen exactly what comes before it on its path


# --- padding


@given(roots=trees, more=st.integers(0, 9))
def test_padding_is_a_root_that_nobody_sees(roots: list[Segment], more: int) -> None:
    pack = layout(roots)
    filled = padded(pack, len(pack) + more)
    padding = [Segment.unsupervised([0] * more)] if more else []
    expected = layout([*roots, *padding])
    for name, value in expected.__dict__.items():
        assert np.array_equal(getattr(filled, name), value), name


def test_a_long_pack_is_not_padded() -> None:
    pack = layout([Segment.unsupervised([1, 2, 3])])
    assert padded(pack, 2) is pack


# --- collate


def shape_of_tree(pack: Pack) -> dict[str, int]:
    return {"segments": len(pack.parents_S)}


def test_collate_shapes() -> None:
    pack = layout([Segment([1, 2, 3], [0.0, 1.0, 2.0])])
    batch = Collator(shape_of_tree)([pack])
    assert (batch.pop("layout"), batch.pop("num_tokens"), batch.pop("index")) == ({"segments": 1}, 2, 0)
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes == {"input_ids": (1, 2), "position_ids": (1, 2), "sources": (2,), "targets": (2,), "weights": (2,)}


def test_collate_pads_and_says_how_many_tokens_are_real() -> None:
    batch = Collator(shape_of_tree, pad_to=8)([layout([Segment([1, 2, 3], [0.0, 1.0, 2.0])])])
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
    assert (batch["layout"], batch["num_tokens"]) == ({"segments": 2}, 2)


def test_collate_takes_one_pack() -> None:
    pack = layout([Segment.unsupervised([1, 2])])
    with pytest.raises(ValueError, match="too many values"):
        Collator(shape_of_tree)([pack, pack])
