"""Decode many branches of one policy, token by token: the policy's keys and values stand once, each branch has a row of its own.

TreeDecoder holds all tokens in one line, and each step of B branches attends past all B of them under a mask. Here a step attends
to the policy and to its own row. Same sums, same scores; what a branch costs does not grow with its neighbours.

Shape suffixes: R rows, T new tokens of a call, Q the most new tokens of a row, P policy tokens, L room of the rows, V vocabulary,
H key heads, G query heads to each, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from guardtrain.errors import ModelError
from guardtrain.inference.decoder import Layers
from guardtrain.inference.inputs import Inputs

ATTENTION = "guardtrain_rows"
ROOM = 64  # rows grow by so many tokens at a time
KEPT_ROOM = 4_096  # tokens of all rows together that are kept for the next ones when the last row is closed


@dataclass
class _Step:
    """One call: where each new token stands, and the rows it attends to.

    token_RQ: by row, its new tokens, the first token where there are fewer. row_T, column_T: the other way. place_T: in its row.
    """

    rows: RowDecoder
    token_RQ: torch.Tensor
    row_T: torch.Tensor
    column_T: torch.Tensor
    place_T: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def hidden(self, window: int | None) -> torch.Tensor:
        """Which tokens of policy and row each new token does not see; bool, shape (R, 1, 1, Q, P + L). Once for all layers."""
        if window not in self._masks:
            self._masks[window] = ~self._visible(window)[:, None, None]
        return self._masks[window]

    def _visible(self, window: int | None) -> torch.Tensor:
        place_RQ1 = self.place_T[self.token_RQ][..., None]
        place_K = torch.arange(-self.rows.policy_length, self.rows.longest, device=place_RQ1.device)
        is_visible_RQK = place_K <= place_RQ1
        return is_visible_RQK if window is None else is_visible_RQK & (place_RQ1 - place_K < window)


class RowDecoder:
    """Branches that do not see each other behind one policy, each in a row of its own.

    model: as `set_attn_implementation(ATTENTION)` leaves it. policy: its layers, each of shape (1, H, P, D).
    """

    def __init__(self, model: Any, policy: Layers) -> None:
        self.model = model
        self.policy = policy
        self.policy_length = policy[0][0].shape[-2]
        self.own = _empty(policy)
        self._names: list[int] = []
        self._lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._names)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self._lengths, default=0)

    @torch.inference_mode()
    def add(self, name: int, layers: Layers) -> None:
        """Open a row that holds these tokens. layers: each of shape (1, H, tokens, D)."""
        length = layers[0][0].shape[-2]
        self._make_room(len(self) + 1, length)
        row = len(self)
        for own, new in zip(self.own, layers, strict=True):
            for room, tokens in zip(own, new, strict=True):
                room[row, :, :length] = tokens[0]
        self._names.append(name)
        self._lengths.append(length)

    @torch.inference_mode()
    def drop(self, name: int) -> None:
        """Close a row; the last one takes its place."""
        row, last = self._names.index(name), len(self) - 1
        if row != last:
            for held in (held for own in self.own for held in own):
                held[row] = held[last]
            self._names[row], self._lengths[row] = self._names[last], self._lengths[last]
        self._names.pop()
        self._lengths.pop()
        rows, _, room, _ = self.own[0][0].shape
        if not self._names and rows * room > KEPT_ROOM:  # a long prompt's room is not kept for short ones
            self.own = _empty(self.policy)

    @torch.inference_mode()
    def extend(self, tokens: Mapping[int, Sequence[int]]) -> torch.Tensor:
        """Append tokens to every row; the logits behind each row's last, float32, shape (R, V), rows in the order of `tokens`.

        tokens: by name, at least one each, and all names that there are.
        """
        return self.inputs(tokens).run(self.model)

    @torch.inference_mode()
    def inputs(self, tokens: Mapping[int, Sequence[int]]) -> Inputs:
        """As `extend`, up to the forward, which is the caller's and must be the next one."""
        device = self.own[0][0].device
        row_of = {name: row for row, name in enumerate(self._names)}
        counts = [len(ids) for ids in tokens.values()]
        order = [row_of[name] for name in tokens]
        lengths = [self._lengths[row] for row in order]
        rows = [row for row, count in zip(order, counts, strict=True) for _ in range(count)]
        columns = [column for count in counts for column in range(count)]
        places = [length + column for length, count in zip(lengths, counts, strict=True) for column in range(count)]
        for row, count in zip(order, counts, strict=True):
            self._lengths[row] += count
        self._make_room(len(self), self.longest)
        row_T, column_T, place_T = torch.tensor([rows, columns, places], device=device)
        token_RQ = torch.zeros(len(self), max(counts), dtype=torch.int64, device=device)
        token_RQ[row_T, column_T] = torch.arange(len(rows), device=device)
        ends = torch.tensor(counts, device=device).cumsum(0) - 1
        ids = torch.tensor([token for ids in tokens.values() for token in ids], device=device)
        attention = {"layout": _Step(self, token_RQ, row_T, column_T, place_T), "use_cache": False}
        return Inputs(ids, place_T + self.policy_length, ends, attention)

    def _make_room(self, num_rows: int, length: int) -> None:
        rows, _, room, _ = self.own[0][0].shape
        if num_rows <= rows and length <= room:
            return
        rows, room = rows if num_rows <= rows else max(num_rows, 2 * rows), room if length <= room else length + ROOM
        self.own = [(_grown(key, rows, room), _grown(value, rows, room)) for key, value in self.own]


def _empty(policy: Layers) -> Layers:
    return [
        (key.new_empty(0, key.shape[1], 0, key.shape[3]), value.new_empty(0, value.shape[1], 0, value.shape[3]))
        for key, value in policy
    ]


def _grown(old: torch.Tensor, rows: int, room: int) -> torch.Tensor:
    new = old.new_zeros(rows, old.shape[1], room, old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: _Step | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer; with a 4-D mask and no step as transformers computes it. Returns (1, T, G * H, D) and no weights.

    Raises ModelError where rows would see each other, or for attention of another kind.
    """
    unknown = sorted(name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None)
    if unknown or (layout is None and (attention_mask is None or attention_mask.ndim != 4)):
        found = ", ".join(unknown) or "neither rows nor a mask"
        raise ModelError("the model's attention is of a kind that is not covered", where=ATTENTION, found=found)
    if layout is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend_rows(query * scale, key, value, layout, module.layer_idx, sliding_window), None


def _attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: _Step, layer: int, window: int | None
) -> torch.Tensor:
    """Append the new tokens to their rows and let each attend to the policy and to its row."""
    rows = step.rows
    own_key, own_value = rows.own[layer]
    own_key[step.row_T, :, step.place_T] = key[0].transpose(0, 1)
    own_value[step.row_T, :, step.place_T] = value[0].transpose(0, 1)
    own_key, own_value = (room[: len(rows), :, : rows.longest] for room in (own_key, own_value))
    (policy_key,), (policy_value,) = rows.policy[layer]
    num_rows, heads, _, size = own_key.shape
    q_RHGQD = query[0][:, step.token_RQ].view(heads, -1, *step.token_RQ.shape, size).permute(2, 0, 1, 3, 4)
    shape = q_RHGQD.shape
    q_RHXD = q_RHGQD.reshape(num_rows, heads, -1, size)
    q_HYD = q_RHXD.transpose(0, 1).reshape(heads, -1, size)
    on_policy = (q_HYD @ policy_key.mT).view(heads, num_rows, -1, rows.policy_length).transpose(0, 1)
    score = torch.cat([on_policy, q_RHXD @ own_key.mT], dim=-1).view(*shape[:-1], -1)
    score.masked_fill_(step.hidden(window), float("-inf"))
    weight = score.softmax(-1, dtype=torch.float32).to(value.dtype).view(num_rows, heads, q_RHXD.shape[2], -1)
    of_policy, of_own = weight[..., : rows.policy_length], weight[..., rows.policy_length :]
    out_HYD = of_policy.transpose(0, 1).reshape(heads, -1, rows.policy_length) @ policy_value
    out_RHXD = of_own @ own_value + out_HYD.view(heads, num_rows, -1, size).transpose(0, 1)
    out_T: torch.Tensor = out_RHXD.view(shape)[step.row_T, :, :, step.column_T].reshape(1, len(step.row_T), -1, size)
    return out_T


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The step carries the masks."""
    return


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)
