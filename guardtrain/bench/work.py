"""What every contender trains on: the rows of a recipe as trees, and the same rows as a peer takes them, copy by copy."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
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
    """rows: trees below the shared policy; copies: the same rows, every completion with a prompt of its own.

    root_ids: the policy's tokens, empty for none.
    """

    rows: list[Segment]
    copies: list[Segment]
    root_ids: list[int]

    def samples(self) -> list[dict[str, list[int]]]:
        """Every completion as a sample of its own, behind policy and prompt, with labels: what peers train on."""
        return [
            {
                "input_ids": self.root_ids + copy.input_ids,
                "labels": [IGNORED] * len(self.root_ids)
                + [token if weight else IGNORED for token, weight in zip(copy.input_ids, copy.weights, strict=True)],
            }
            for copy in self.copies
        ]


def build_work(recipe: Recipe, tokenizer: Any, *, num_rows: int, policy_tokens: int | None) -> Work:
    """A sample of the recipe's training rows, each supervised token weighted alike: peers know no other weights.

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
    trees = [build_tree(template, row, task.modes) for row in rows]
    chosen = stratified([len(tree) for tree in trees], num_rows, recipe.train.seed)
    # A chat has no modes: it is one sample.
    copies = [
        build_tree(template, rows[row], [mode]) for row in chosen for mode in (task.modes if task.kind == "guard" else [""])
    ]
    root_ids = template.policy_ids if isinstance(template, GuardTemplate) and policy_tokens != 0 else []
    return Work([trees[row] for row in chosen], copies, root_ids)


def stratified(lengths: Sequence[int], number: int, seed: int) -> list[int]:
    """`number` of the rows, drawn one from each of as many equal classes of length: few rows stand for all, short and long."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    draw = random.Random(seed)
    chosen = [draw.choice(order[len(order) * i // number : len(order) * (i + 1) // number]) for i in range(number)]
    draw.shuffle(chosen)
    return chosen


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
