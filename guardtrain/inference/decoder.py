"""Decode many prompts as branches of one cached policy: the tree of training, grown token by token.

Shape suffixes: B branches, Q new tokens of one call, K cached tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from guardtrain.model.attention import attention_windows

_SHARED = -1


class TreeDecoder:
    """A key/value cache that holds the policy once and any number of branches that do not see each other.

    model: a transformers causal language model that takes a prepared 4-D attention mask.
    """

    def __init__(self, model: Any, policy_ids: list[int]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        # Without the config: layers with a sliding window would drop keys that the mask still counts.
        self._cache = DynamicCache()
        self._owner_K = torch.empty(0, dtype=torch.int64, device=self.device)
        self._position_K = torch.empty(0, dtype=torch.int64, device=self.device)
        self._next_position: list[int] = []
        self._policy_length = len(policy_ids)
        self._forward(policy_ids, [_SHARED] * len(policy_ids), list(range(len(policy_ids))), [len(policy_ids) - 1])

    def start(self, num_branches: int) -> None:
        """Forget all branches and open `num_branches` new ones behind the policy."""
        self._crop(self._policy_length)
        self._next_position = [self._policy_length] * num_branches

    def extend(self, tokens: dict[int, list[int]], *, keep: bool = True) -> torch.Tensor:
        """Append tokens to branches; the logits that follow each branch's last new token, float32, shape (len(tokens), V).

        tokens: branch to its new token ids, at least one each; rows of the result are in this order.
        keep: False to look only: the branches are afterwards as before.
        """
        ids: list[int] = []
        owners: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for branch, new_ids in tokens.items():
            start = self._next_position[branch]
            ids += new_ids
            owners += [branch] * len(new_ids)
            positions += range(start, start + len(new_ids))
            last.append(len(ids) - 1)
        cached = len(self._owner_K)
        logits_BV = self._forward(ids, owners, positions, last)
        if keep:
            for branch, new_ids in tokens.items():
                self._next_position[branch] += len(new_ids)
        else:
            self._crop(cached)
        return logits_BV

    def _crop(self, length: int) -> None:
        surplus = len(self._owner_K) - length
        if surplus > 0:
            self._cache.crop(-surplus)  # negative: how many tokens to remove
            self._owner_K, self._position_K = self._owner_K[:length], self._position_K[:length]

    @torch.no_grad()
    def _forward(self, ids: list[int], owners: list[int], positions: list[int], last: list[int]) -> torch.Tensor:
        owner_Q, position_Q = torch.tensor(owners, device=self.device), torch.tensor(positions, device=self.device)
        num_cached = len(self._owner_K)
        self._owner_K = torch.cat([self._owner_K, owner_Q])
        self._position_K = torch.cat([self._position_K, position_Q])
        index_K = torch.arange(len(self._owner_K), device=self.device)
        is_past_QK = index_K[None, :] <= num_cached + torch.arange(len(ids), device=self.device)[:, None]
        is_visible_QK = (self._owner_K[None, :] == owner_Q[:, None]) | (self._owner_K == _SHARED)[None, :]
        output = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=position_Q[None],
            attention_mask=self._masks(is_past_QK & is_visible_QK, position_Q),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(last, device=self.device),
        )
        logits_BV: torch.Tensor = output.logits[0].float()
        return logits_BV

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
