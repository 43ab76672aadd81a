"""Decode many prompts as branches of one cached policy: the tree of training, grown token by token.

A forward's logits depend in their last bits on what else is in the batch: kernels add up in another order for another shape.
2026-11, float32 on a CPU, twelve prompts: scores of SmolLM2-135M moved by 1.2e-5 at most. `alone` computes the same position
from the branch's own tokens only.

Shape suffixes: B branches, Q new tokens of one call, K cached tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from guardtrain.inference.inputs import Inputs
from guardtrain.model.attention import attention_windows

_SHARED = -1
# Prompts are read in blocks of about this many tokens: a block attends to the policy and to itself, so that a batch of T
# tokens costs T * block and not T * T.
BLOCK_TOKENS = 256

Layers = list[tuple[torch.Tensor, torch.Tensor]]


class TreeDecoder:
    """A key/value cache that holds the policy once and any number of branches that do not see each other.

    model: a transformers causal language model that takes a prepared 4-D attention mask.
    """

    def __init__(self, model: Any, policy_ids: list[int]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        # Without the config: layers with a sliding window would drop keys that the mask still counts.
        self._cache: Any = DynamicCache()
        self._owner_K, self._position_K = self._indices([]), self._indices([])
        self._parents: list[int | None] = []
        self._ids: list[list[int]] = []
        length = len(policy_ids)
        self._forward(policy_ids, [_SHARED] * length, list(range(length)), [])
        self._policy = self._layers()
        self._policy_length = length
        self.start(0)

    def start(self, num_branches: int) -> None:
        """Forget all branches, and what they hold in memory, and open `num_branches` new ones behind the policy."""
        self._rewind()
        self._parents = [None] * num_branches
        self._ids = [[] for _ in range(num_branches)]

    def read(self, prompts: Sequence[list[int]]) -> None:
        """Forget all branches and open one for each prompt, which it begins with."""
        self.start(len(prompts))
        parts: list[Layers] = []
        owners, positions = [self._owner_K], [self._position_K]
        for block in _blocks(prompts):
            self._rewind()
            self._run(self._new(block, last=[]))
            parts.append(self._layers(self._policy_length))
            owners.append(self._owner_K[self._policy_length :])
            positions.append(self._position_K[self._policy_length :])
        layers = [tuple(torch.cat(pieces, dim=-2) for pieces in zip(*each, strict=True)) for each in zip(*parts, strict=True)]
        whole = [
            (torch.cat([key, new_key], dim=-2), torch.cat([value, new_value], dim=-2))
            for (key, value), (new_key, new_value) in zip(self._policy, layers, strict=True)
        ]
        self._hold(whole if parts else self._policy, torch.cat(owners), torch.cat(positions))

    def fork(self, branch: int, copies: int) -> list[int]:
        """Open `copies` branches that go on from what `branch` holds now; it must not grow any more. Returns them."""
        first = len(self._ids)
        self._parents += [branch] * copies
        self._ids += [[] for _ in range(copies)]
        return list(range(first, first + copies))

    @property
    def policy_layers(self) -> Layers:
        """Keys and values of the policy, each of shape (1, H, tokens, D)."""
        return self._policy

    def held(self, branches: Sequence[int]) -> Layers:
        """Copies of the keys and values that these branches hold themselves, in the order in which they were read."""
        is_held_K = torch.isin(self._owner_K, self._indices(branches))
        return [(key[..., is_held_K, :], value[..., is_held_K, :]) for key, value in self._layers()]

    def drop(self, branches: Iterable[int]) -> None:
        """Free what these branches hold; they must not be used any more, and have no forks that are."""
        is_kept_K = ~torch.isin(self._owner_K, self._indices(list(branches)))
        if int(is_kept_K.sum()) == self._policy_length:
            self._rewind()  # no second copy of the policy
            return
        layers = [(key[..., is_kept_K, :], value[..., is_kept_K, :]) for key, value in self._layers()]
        self._hold(layers, self._owner_K[is_kept_K], self._position_K[is_kept_K])

    def extend(self, tokens: dict[int, list[int]], *, keep: bool = True, heads: Collection[int] | None = None) -> torch.Tensor:
        """Append tokens to branches; the logits that follow each branch's last new token, float32, shape (len(tokens), V).

        tokens: branch to its new token ids, at least one each; rows of the result are in this order. A fork stands behind what
        it goes on from.
        keep: False to look only: the branches are afterwards as before. heads: only the logits of these; all if absent.
        """
        cached = len(self._owner_K)
        logits_BV = self._run(self.inputs(tokens, heads=heads))
        if not keep:
            self._crop(cached)
            for branch, ids in tokens.items():
                del self._ids[branch][len(self._ids[branch]) - len(ids) :]
        return logits_BV

    def inputs(self, tokens: dict[int, list[int]], *, heads: Collection[int] | None = None) -> Inputs:
        """As `extend`, up to the forward, which is the caller's and must be the next one."""
        ends = zip(tokens, accumulate(len(ids) for ids in tokens.values()), strict=True)
        return self._new(tokens, last=[end - 1 for branch, end in ends if heads is None or branch in heads])

    def alone(self, branch: int, ahead: Sequence[int] = ()) -> torch.Tensor:
        """The logits behind a branch and `ahead`, computed anew from the policy and these tokens: float32, shape (V,).

        Bit for bit the same in whatever batch the branch stands. It costs a forward of the whole branch.
        """
        return self.apart([*self._path(branch), *ahead])

    def apart(self, ids: list[int]) -> torch.Tensor:
        """The logits behind the policy and these tokens, float32, shape (V,); the branches stay as they are."""
        held = self._cache, self._owner_K, self._position_K
        self._rewind()
        logits_BV = self._forward(ids, [_SHARED] * len(ids), self._positions(0, len(ids)), [len(ids) - 1])
        self._cache, self._owner_K, self._position_K = held
        return logits_BV[0]

    def _new(self, tokens: dict[int, list[int]], last: list[int]) -> Inputs:
        ids: list[int] = []
        owners: list[int] = []
        positions: list[int] = []
        for branch, new_ids in tokens.items():
            ids += new_ids
            owners += [branch] * len(new_ids)
            positions += self._positions(len(self._path(branch)), len(new_ids))
            self._ids[branch] += new_ids
        return self._inputs(ids, owners, positions, last)

    def _path(self, branch: int) -> list[int]:
        """All tokens of a branch behind the policy."""
        parent = self._parents[branch]
        return self._ids[branch] if parent is None else [*self._path(parent), *self._ids[branch]]

    def _positions(self, start: int, length: int) -> list[int]:
        return list(range(self._policy_length + start, self._policy_length + start + length))

    def _rewind(self) -> None:
        """Hold the policy alone."""
        length = self._policy_length
        self._hold(self._policy, torch.full((length,), _SHARED, device=self.device), torch.arange(length, device=self.device))

    def _hold(self, layers: Layers, owner_K: torch.Tensor, position_K: torch.Tensor) -> None:
        self._cache = DynamicCache()
        self._cache.layers = [_layer(key, value) for key, value in layers]
        self._owner_K, self._position_K = owner_K, position_K

    def _layers(self, start: int = 0) -> Layers:
        """Keys and values of each layer, of shape (1, H, K - start, D)."""
        return [(layer.keys[..., start:, :], layer.values[..., start:, :]) for layer in self._cache.layers]

    def _crop(self, length: int) -> None:
        self._cache.crop(length - len(self._owner_K))  # negative: how many tokens to remove
        self._owner_K, self._position_K = self._owner_K[:length], self._position_K[:length]

    def _forward(self, ids: list[int], owners: list[int], positions: list[int], last: list[int]) -> torch.Tensor:
        """Run the model over new tokens; the logits at those of index `last`, float32, shape (len(last), V)."""
        return self._run(self._inputs(ids, owners, positions, last))

    @torch.no_grad()  # not inference_mode: under ZeRO-3 weights gathered in it could not be trained with afterwards
    def _run(self, inputs: Inputs) -> torch.Tensor:
        return inputs.run(self.model)

    def _inputs(self, ids: list[int], owners: list[int], positions: list[int], last: list[int]) -> Inputs:
        owner_Q, position_Q = self._indices(owners), self._indices(positions)
        num_cached = len(self._owner_K)
        self._owner_K = torch.cat([self._owner_K, owner_Q])
        self._position_K = torch.cat([self._position_K, position_Q])
        index_K = torch.arange(len(self._owner_K), device=self.device)
        is_past_QK = index_K[None, :] <= num_cached + torch.arange(len(ids), device=self.device)[:, None]
        mask = self._masks(is_past_QK & self._is_visible(owners, owner_Q), position_Q)
        attention = {"attention_mask": mask, "past_key_values": self._cache, "use_cache": True}
        return Inputs(self._indices(ids), position_Q, self._indices(last), attention)

    def _is_visible(self, owners: list[int], owner_Q: torch.Tensor) -> torch.Tensor:
        """Which cached tokens are the policy's, a branch's own, or its parent's; bool, shape (Q, K)."""
        is_visible_QK = (self._owner_K[None, :] == owner_Q[:, None]) | (self._owner_K == _SHARED)[None, :]
        parents = [None if owner == _SHARED else self._parents[owner] for owner in owners]
        if any(parent is not None for parent in parents):
            parent_Q = self._indices([_SHARED if parent is None else parent for parent in parents])
            is_visible_QK |= self._owner_K[None, :] == parent_Q[:, None]
        return is_visible_QK

    def _masks(self, is_visible_QK: torch.Tensor, position_Q: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask of all layers, or one for each kind of layer where only some have a sliding window."""
        windows = attention_windows(self.model.config)
        if not windows:
            return is_visible_QK[None, None]
        is_near_QK = position_Q[:, None] - self._position_K[None, :] < min(windows)
        windowed = (is_visible_QK & is_near_QK)[None, None]
        if getattr(self.model.config.get_text_config(), "layer_types", None) is None:
            return windowed
        return {"full_attention": is_visible_QK[None, None], "sliding_attention": windowed}

    def _indices(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _layer(key: torch.Tensor, value: torch.Tensor) -> DynamicLayer:
    """A layer of the cache that begins with these, which are not copied: nothing is ever written into them."""
    layer = DynamicLayer()
    layer.keys, layer.values, layer.dtype, layer.device = key, value, key.dtype, key.device
    layer.is_initialized = True
    return layer


def _blocks(prompts: Sequence[list[int]]) -> list[dict[int, list[int]]]:
    """Consecutive prompts by their index, in groups of at most BLOCK_TOKENS tokens; a longer one stands alone."""
    blocks: list[dict[int, list[int]]] = []
    room = 0
    for index, ids in enumerate(prompts):
        if len(ids) > room:
            blocks.append({})
            room = BLOCK_TOKENS
        blocks[-1][index] = ids
        room -= len(ids)
    return blocks
