"""Every pack of a run, in order, known before the first step: what makes resuming exact and ranks agree."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence

from torch.utils.data import Dataset

from guardtrain.data.packing import Pack, Segment, layout, plan_packs
from guardtrain.errors import ConfigError

MIN_ROOM = 128


class PackStream(Dataset[Pack]):
    """Packs of all epochs one after the other; item i is the i-th micro-batch over all ranks.

    rows: the row trees; rows_of_epoch: which of them epoch e sees, in any order.
    pairs: for each row the name of its minimal pair, or "". Twins train in the same pack: what they share cancels in the
    gradient of that step, and what tells them apart remains.
    root_ids: the shared policy's tokens, empty for flat packs. pack_tokens: budget of a pack, the root included.
    multiple: packs of an optimizer step over all ranks, so that every step is full.
    epochs: may end within an epoch; max_steps: ends the run earlier.
    Raises ConfigError when the policy leaves no room, or rows cannot fill one step.
    """

    def __init__(
        self,
        rows: Sequence[Segment],
        rows_of_epoch: Callable[[int], Sequence[int]],
        *,
        pairs: Sequence[str] = (),
        root_ids: list[int],
        pack_tokens: int,
        multiple: int,
        epochs: float,
        max_steps: int | None = None,
        seed: int,
    ) -> None:
        self.rows = rows
        self.root_ids = root_ids
        room = pack_tokens - len(root_ids)
        if room < MIN_ROOM:
            raise ConfigError(
                "the policy leaves no room for rows",
                where="train.pack_tokens",
                expected=f"at least {len(root_ids) + MIN_ROOM}",
                found=str(pack_tokens),
            )
        self._lengths = [len(row) for row in rows]
        self.packs: list[list[int]] = []
        self.packs_per_epoch: list[int] = []
        for epoch in range(math.ceil(epochs)):
            units = group_twins(rows_of_epoch(epoch), pairs)
            lengths = [sum(self._lengths[row] for row in unit) for unit in units]
            try:
                planned = plan_packs(lengths, room, num_packs_multiple=multiple, seed=seed + epoch)
            except ValueError as error:
                hint = "fewer packs a step or more rows"
                raise ConfigError(str(error), where="train.packs_per_step", hint=hint) from error
            wanted = min(1.0, epochs - epoch) * len(planned)
            keep = math.ceil(round(wanted / multiple, 9)) * multiple  # 0.1 of ten steps is one, though 1.1 - 1 is more than 0.1
            self.packs += [[row for unit in pack for row in units[unit]] for pack in planned[:keep]]
            self.packs_per_epoch.append(len(planned))
        if max_steps is not None:
            del self.packs[max_steps * multiple :]
        if not self.packs:
            raise ConfigError("no rows to train on", where="data.train", hint="the sources' weights leave none in an epoch")
        self.multiple, self.seed = multiple, seed
        self.num_steps = len(self.packs) // multiple

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        rows = [self.rows[row] for row in self.packs[index]]
        pack = layout([Segment.unsupervised(self.root_ids, rows)] if self.root_ids else rows)
        return dataclasses.replace(pack, index=index)

    def cursor(self, steps: int) -> dict[str, int | float | str]:
        """Where the data are after so many optimizer steps, for a checkpoint's manifest."""
        return {"packs": steps * self.multiple, "epoch": self.epoch_after(steps), "seed": self.seed, "data": self.fingerprint}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every pack's rows, token by token, in order: equal streams train equally."""
        digest = hashlib.blake2b(repr((self.root_ids, self.packs)).encode(), digest_size=16)
        for row in self.rows:
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def epoch_after(self, steps: int) -> float:
        """How many epochs of rows `steps` optimizer steps have seen."""
        left = steps * self.multiple
        for epoch, packs in enumerate(self.packs_per_epoch):
            if left <= packs:
                return epoch + left / packs
            left -= packs
        return float(len(self.packs_per_epoch))

    def fill(self, pack_tokens: int) -> float:
        """Tokens in all packs divided by their budgets; the budget of a row that is longer is its own length."""
        used = [len(self.root_ids) + sum(self._lengths[row] for row in pack) for pack in self.packs]
        return sum(used) / sum(max(pack_tokens, tokens) for tokens in used)


def group_twins(rows: Sequence[int], pairs: Sequence[str]) -> list[list[int]]:
    """`rows` in units that stay together: those of one pair in one unit, every other row alone. Order of first appearance.

    A row that comes several times (a source's weight) is in as many units: twins share a pack, copies need not.
    """
    if not any(pairs):
        return [[row] for row in rows]
    units: dict[object, list[int]] = {}
    copies: Counter[int] = Counter()
    for position, row in enumerate(rows):
        pair = pairs[row]
        units.setdefault((pair, copies[row]) if pair else position, []).append(row)
        copies[row] += 1
    return list(units.values())
