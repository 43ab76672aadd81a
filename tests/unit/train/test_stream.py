"""All packs of a run are known before its first step: full steps, whole epochs, and a policy at every root."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardtrain.data.packing import Segment
from guardtrain.errors import ConfigError
from guardtrain.train.stream import MIN_ROOM, PackStream, group_twins

ROOT_IDS = [1, 2, 3]


def rows_of_lengths(lengths: list[int]) -> list[Segment]:
    """Row r holds only the token 100 + r, so that a pack tells which rows are in it; its last one is only predicted."""
    return [Segment([100 + row] * (length + 1), [0.0, *[1.0] * length]) for row, length in enumerate(lengths)]


def stream(lengths: list[int], *, epochs: float = 1.0, multiple: int = 1, seed: int = 0, **arguments: object) -> PackStream:
    everything = range(len(lengths))
    settings = {"root_ids": ROOT_IDS, "pack_tokens": len(ROOT_IDS) + MIN_ROOM, **arguments}
    return PackStream(rows_of_lengths(lengths), lambda epoch: everything, epochs=epochs, multiple=multiple, seed=seed, **settings)


def rows_in(packs: PackStream, start: int = 0, stop: int | None = None) -> Counter[int]:
    seen: Counter[int] = Counter()
    for index in range(start, len(packs) if stop is None else stop):
        ids_T = packs[index].input_ids_T
        seen.update({int(row) - 100 for row in np.unique(ids_T[ids_T >= 100])})
    return seen


lengths_strategy = st.lists(st.integers(2, MIN_ROOM // 2), min_size=12, max_size=40)


@given(lengths=lengths_strategy, epochs=st.integers(1, 3), multiple=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_row_once_per_epoch_in_full_steps(lengths: list[int], epochs: int, multiple: int, seed: int) -> None:
    packs = stream(lengths, epochs=epochs, multiple=multiple, seed=seed)
    assert rows_in(packs) == dict.fromkeys(range(len(lengths)), epochs)
    assert len(packs) % multiple == 0
    assert packs.num_steps * multiple == len(packs) == sum(packs.packs_per_epoch)
    start = 0
    for number in packs.packs_per_epoch:
        assert rows_in(packs, start, start + number) == dict.fromkeys(range(len(lengths)), 1)
        start += number
    assert all(len(packs[index]) <= len(ROOT_IDS) + MIN_ROOM for index in range(len(packs)))


@given(lengths=lengths_strategy, epochs=st.sampled_from([1.0, 1.5, 3.0]), multiple=st.integers(1, 3))
def test_steps_are_counted_in_epochs_of_rows(lengths: list[int], epochs: float, multiple: int) -> None:
    packs = stream(lengths, epochs=epochs, multiple=multiple)
    assert packs.epoch_after(0) == 0
    after = [packs.epoch_after(step) for step in range(packs.num_steps + 1)]
    assert after == sorted(after)
    steps = [count // multiple for count in packs.packs_per_epoch]
    assert packs.epoch_after(steps[0]) == 1
    if epochs == 3:
        assert (packs.epoch_after(steps[0] + steps[1]), after[-1]) == (2, 3)
    else:
        assert epochs <= after[-1] < epochs + 1 / steps[-1]  # only full steps


def test_each_pack_has_the_policy_once_and_first() -> None:
    packs = stream([30] * 20)
    for index in range(len(packs)):
        pack = packs[index]
        assert pack.input_ids_T.tolist()[:3] == ROOT_IDS
        assert (pack.input_ids_T < 100).sum() == len(ROOT_IDS)
        assert pack.parents_S.tolist() == [-1] + [0] * (len(pack.parents_S) - 1)


def test_without_a_policy_packs_are_flat() -> None:
    pack = stream([30] * 4, root_ids=[])[0]
    assert pack.parents_S.tolist() == [-1] * 4


def test_a_stream_is_the_same_again_and_epochs_differ() -> None:
    lengths = [5 + row % 40 for row in range(60)]
    one, two = stream(lengths, epochs=2), stream(lengths, epochs=2)
    assert one.packs == two.packs
    first, second = one.packs[: one.packs_per_epoch[0]], one.packs[one.packs_per_epoch[0] :]
    assert first != second
    assert stream(lengths, epochs=1).packs == first  # more epochs change nothing about the earlier ones
    assert stream(lengths, seed=1).packs != first


def test_a_tenth_of_ten_steps_is_one() -> None:
    """Two epochs of ten packs each; 1.1 - 1 is a little more than 0.1."""
    packs = stream([MIN_ROOM] * 10, epochs=1.1)
    assert (packs.packs_per_epoch, packs.num_steps) == ([10, 10], 11)


@pytest.mark.parametrize(("epochs", "share"), [(0.5, 0.5), (1.25, 1.25), (2.0, 2.0)])
def test_epochs_may_end_within_an_epoch(epochs: float, share: float) -> None:
    lengths = [40] * 120
    whole = len(stream(lengths))
    assert len(stream(lengths, epochs=epochs)) == pytest.approx(share * whole, abs=1)
    assert len(stream(lengths, epochs=epochs, multiple=4)) % 4 == 0


def test_max_steps_ends_the_run_earlier_and_never_later() -> None:
    lengths = [40] * 60
    whole = stream(lengths, multiple=2)
    short = stream(lengths, multiple=2, max_steps=3)
    assert short.num_steps == 3
    assert short.packs == whole.packs[:6]
    assert stream(lengths, multiple=2, max_steps=10_000).packs == whole.packs


def test_each_epoch_sees_its_own_rows() -> None:
    rows = rows_of_lengths([20] * 30)
    packs = PackStream(
        rows,
        lambda epoch: range(10) if epoch == 0 else range(5, 30),
        root_ids=ROOT_IDS,
        pack_tokens=200,
        multiple=1,
        epochs=2,
        seed=0,
    )
    assert rows_in(packs, 0, packs.packs_per_epoch[0]) == dict.fromkeys(range(10), 1)
    assert rows_in(packs, packs.packs_per_epoch[0]) == dict.fromkeys(range(5, 30), 1)


def test_a_policy_that_leaves_no_room_is_refused_with_what_would_do() -> None:
    with pytest.raises(ConfigError, match=rf"train.pack_tokens: .*at least {3 + MIN_ROOM}, found {2 + MIN_ROOM}"):
        stream([10] * 4, pack_tokens=2 + MIN_ROOM)


def test_too_few_rows_for_one_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.packs_per_step: 3 rows cannot fill a multiple of 4"):
        stream([10] * 3, multiple=4)


def test_fill_is_the_share_of_the_budget_that_is_used() -> None:
    packs = stream([64] * 4)
    assert len(packs) == 2
    assert packs.fill(len(ROOT_IDS) + MIN_ROOM) == 1.0
    assert packs.fill(2 * (len(ROOT_IDS) + MIN_ROOM)) == 0.5


def test_twins_train_in_the_same_pack() -> None:
    """Twelve pairs and eight single rows over many small packs: no pair is torn, in any epoch, and no row is lost."""
    rows = [Segment([1] * 60, [1.0] * 60) for _ in range(32)]
    pairs = [f"pair-{number // 2}" if number < 24 else "" for number in range(32)]
    stream = PackStream(
        rows, lambda epoch: list(range(32)), pairs=pairs, root_ids=[1] * 10, pack_tokens=300, multiple=2, epochs=3, seed=0
    )
    assert len(stream) > 12
    for pack in stream.packs:
        assert all(pack.count(row) == pack.count(row ^ 1) for row in pack if row < 24)
    assert sorted(row for pack in stream.packs for row in pack) == sorted([*range(32)] * 3)


def test_copies_of_a_pair_stand_in_units_of_their_own() -> None:
    """A source's weight of 2 gives each row twice: two units of twins, not one of four rows."""
    assert group_twins([0, 1, 2, 0, 1, 2], ["a", "a", ""]) == [[0, 1], [2], [0, 1], [2]]


def test_an_epoch_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rows to train on"):
        PackStream(rows_of_lengths([5]), lambda epoch: [], root_ids=[], pack_tokens=500, multiple=1, epochs=1, seed=0)


def test_the_fingerprint_is_of_rows_and_order() -> None:
    one = stream([30] * 20).fingerprint
    assert one == stream([30] * 20).fingerprint
    assert one != stream([30] * 20, seed=1).fingerprint
    assert one != stream([30] * 19 + [31]).fingerprint


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_get_equally_many_packs_and_every_row_once(ranks: int) -> None:
    """By accelerate's own sharding, which is what hands packs to ranks."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    lengths = [5 + 7 * row % 60 for row in range(60)]
    packs = stream(lengths, epochs=2, multiple=ranks)
    loaders = [
        prepare_data_loader(
            DataLoader(packs, batch_size=1, shuffle=False, collate_fn=lambda batch: batch[0]),
            num_processes=ranks,
            process_index=rank,
            put_on_device=False,
        )
        for rank in range(ranks)
    ]
    shares = [[set(pack.input_ids_T.tolist()) for pack in loader] for loader in loaders]
    assert len({len(share) for share in shares}) == 1
    seen = Counter(token for share in shares for pack in share for token in pack if token >= 100)
    assert seen == Counter({100 + row: 2 for row in range(60)})
