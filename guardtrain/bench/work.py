"""What every contender trains on: the rows of a recipe as trees, and the same rows as a peer takes them, copy by copy."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from guardtrain.config import Recipe
from guardtrain.data.packing import Segment
from guardtrain.data.template import GuardTemplate
from guardtrain.errors import ConfigError
from guardtrain.train.rows import build_template, build_tree, load_rows
from guardtrain.types import GuardExample, Mode

IGNORED = -100  # the label of a token that is not supervised, as all peers spell it


@dataclass(frozen=True)
class Work:
    """rows: trees below the shared policy; root_ids: the policy's tokens, empty for none."""

    rows: list[Segment]
    root_ids: list[int]

    def samples(self) -> list[dict[str, list[int]]]:
        """Each root-to-leaf path as a sample of its own, with labels: what peers train on."""
        return [
            {"input_ids": ids, "labels": [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)]}
            for row in self.rows
            for ids, weights in _paths(row, self.root_ids, [0.0] * len(self.root_ids))
        ]


def _paths(segment: Segment, ids: list[int], weights: list[float]) -> Iterator[tuple[list[int], list[float]]]:
    ids, weights = ids + segment.input_ids, weights + segment.weights
    if not segment.children:
        yield ids, weights
    for child in segment.children:
        yield from _paths(child, ids, weights)


def build_work(recipe: Recipe, tokenizer: Any, *, num_rows: int, policy_tokens: int | None) -> Work:
    """A seeded sample of the recipe's training rows, each supervised token weighted alike: peers know no other weights.

    policy_tokens: length of the shared policy, 0 for none; None leaves the recipe's own.
    Raises ConfigError when there are fewer rows than asked for.
    """
    task = dataclasses.replace(recipe.task, verdict_weight=1.0)
    template = build_template(tokenizer, task)
    if isinstance(template, GuardTemplate) and policy_tokens:
        policy = policy_of_length(tokenizer, recipe.task.policy, policy_tokens)
        template = build_template(tokenizer, dataclasses.replace(task, policy=policy))
    rows = load_rows(recipe, template).train
    if Mode.ON in task.modes and task.kind == "guard":
        rows = [row for row in rows if isinstance(row, GuardExample) and row.reason]
    if len(rows) < num_rows:
        raise ConfigError("too few rows for this benchmark", where="--rows", expected=f"at most {len(rows)}", found=str(num_rows))
    chosen = random.Random(recipe.train.seed).sample(rows, num_rows)
    root_ids = template.policy_ids if isinstance(template, GuardTemplate) and policy_tokens != 0 else []
    return Work([build_tree(template, row, task.modes) for row in chosen], root_ids)


def policy_of_length(tokenizer: Any, policy: str, policy_tokens: int) -> str:
    """`policy`, repeated or cut, so that with the template's scaffold it takes about `policy_tokens` tokens."""
    empty = build_template(tokenizer, dataclasses.replace(Recipe().task, policy=""))
    assert isinstance(empty, GuardTemplate)
    wanted = policy_tokens - len(empty.policy_ids)
    if wanted < 1:
        raise ConfigError(
            "the template alone is longer", where="--policy-tokens", expected=f"more than {len(empty.policy_ids)}, or 0"
        )
    ids = empty.encoder.plain(policy + " ")
    return str(tokenizer.decode((ids * (wanted // len(ids) + 1))[:wanted]))
