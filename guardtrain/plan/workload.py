"""How much there is to train: tokens of a recipe's rows, estimated from their characters, and how many packs they fill.

Counting with the model's tokenizer takes longer than a plan may, and needs the model. Characters are enough: on English rows the
estimate is within a tenth of the count (a test holds it against a real tokenizer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guardtrain.config import Recipe, TaskConfig
from guardtrain.data.records import STARTERS
from guardtrain.data.sources import load_sources
from guardtrain.errors import ConfigError
from guardtrain.plan.setup import PackShape
from guardtrain.types import ChatExample, Example, GuardExample, Label, Turn, prompt_text

# Of byte-pair vocabularies of 49 to 152 thousand entries: prompts with their code and odd spellings, and plain sentences.
CHARACTERS_OF_PROMPTS, CHARACTERS_OF_PROSE = 4.0, 4.8
# What the chat templates put around the policy; the end of the user's turn; an empty and a filled think block with the verdict.
POLICY_SCAFFOLD, PROMPT_SCAFFOLD, OFF_TOKENS, ON_SCAFFOLD = 8, 6, 10, 11
SUPERVISED_OF_OFF, SUPERVISED_OF_ON_SCAFFOLD = 2, 13
# The system turn that many templates begin a chat with, and what they put around each turn.
CHAT_SCAFFOLD, CHAT_TURN_SCAFFOLD = 22, 5
# Of a row, what a pack has left at its end: packs of 256 tokens of the starter's pairs are 90 % full, of 4,096 tokens of real
# rows 99.6 % (benchmarks/results/packing.json).
LEFT_OF_A_ROW, MOST_LEFT = 0.4, 0.1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Rows of one epoch and means of a row: its own tokens, and the supervised among them.

    policy_tokens: shared by a pack's rows. epochs: of the recipe. said: where the figures come from, for people.
    """

    rows: int
    row_tokens: float
    supervised_tokens: float
    policy_tokens: int
    epochs: float
    said: str

    def pack(self, budget: int, *, is_padded: bool) -> PackShape:
        """A typical pack of `budget` tokens, padded to it or not. Raises ConfigError where no row fits beside the policy."""
        if budget - self.policy_tokens < self.row_tokens:
            expected = f"at least {math.ceil(self.policy_tokens + self.row_tokens)}, for the policy and one row"
            raise ConfigError("too small for the rows", where="train.pack_tokens", expected=expected, found=str(budget))
        rows = self.rows_of_pack(budget)
        return PackShape(
            budget=budget,
            tokens=budget if is_padded else round(self.policy_tokens + rows * self.row_tokens),
            root_tokens=self.policy_tokens,
            supervised_tokens=max(1, round(rows * self.supervised_tokens)),
            row_tokens=round(self.row_tokens),
        )

    def rows_of_pack(self, budget: int) -> float:
        """How many rows share a pack."""
        room = budget - self.policy_tokens
        left = min(MOST_LEFT, LEFT_OF_A_ROW * self.row_tokens / room)
        return (1 - left) * room / self.row_tokens

    def steps(self, budget: int, packs_per_step: int) -> int:
        """Optimizer steps of all epochs, the last of each filled up."""
        packs = self.rows / self.rows_of_pack(budget)
        return math.ceil(math.ceil(packs / packs_per_step) * self.epochs)


def workload_of(recipe: Recipe, *, rows: int | None = None) -> Workload:
    """The work of `recipe`, from its rows. rows: how many train, for data that are not here; their lengths are the usual ones.

    Raises ConfigError for data that are not here, when their number is not given.
    """
    task, data = recipe.task, recipe.data
    if rows is None:
        examples = _read(recipe)
        held_out = 0.0 if data.validation else data.validation_fraction
        number, said = max(1, round(_rows_of_epoch(recipe, len(examples)) * (1 - held_out))), "of the recipe's data"
    else:
        examples, number, said = [_typical(task.kind)], rows, "of the usual length"
    sizes = [_row_size(example, task) for example in examples]
    return Workload(
        rows=number,
        row_tokens=sum(tokens for tokens, _ in sizes) / len(sizes),
        supervised_tokens=sum(supervised for _, supervised in sizes) / len(sizes),
        policy_tokens=round(len(task.policy) / CHARACTERS_OF_PROSE) + POLICY_SCAFFOLD if task.kind == "guard" else 0,
        epochs=recipe.train.epochs,
        said=f"{number:,} rows {said}",
    )


def _read(recipe: Recipe) -> Sequence[Example]:
    """The recipe's rows; nothing is downloaded."""
    hint = "--rows says how many there are, for data that are elsewhere"
    for source in recipe.data.train:
        if source.path not in STARTERS and not Path(source.path).expanduser().exists():
            raise ConfigError("no such file or folder here", where="data.train", found=source.path, hint=hint)
    loaded = load_sources(recipe.data.train, recipe.task.kind)
    if not loaded.examples:
        found = next((f"{problem.where}: {problem.what}" for problem in loaded.problems), "no rows")
        raise ConfigError("the data have no row that can be trained", where="data.train", found=found)
    return loaded.examples


def _typical(kind: str) -> Example:
    """A row of average length: of public guard data sets, and of question and answer sets."""
    if kind == "guard":
        return GuardExample(prompt=(Turn("user", "x" * 330),), label=Label.BENIGN, reason="x" * 150)
    return ChatExample(turns=(Turn("user", "x" * 250), Turn("assistant", "x" * 1000)))


def _rows_of_epoch(recipe: Recipe, found: int) -> float:
    weights = [source.weight for source in recipe.data.train]
    rows = found * sum(weights) / len(weights)
    return rows if recipe.data.max_rows is None else min(rows, recipe.data.max_rows)


def _row_size(example: Example, task: TaskConfig) -> tuple[float, float]:
    """Tokens of a row below the policy, and the supervised among them."""
    if not isinstance(example, GuardExample):
        turns = [(turn.role, len(turn.content) / CHARACTERS_OF_PROSE) for turn in example.turns]
        answers = sum(length + 1 for role, length in turns if role == "assistant")
        return CHAT_SCAFFOLD + sum(length + CHAT_TURN_SCAFFOLD for _, length in turns), answers
    tokens, supervised = len(prompt_text(example.prompt)) / CHARACTERS_OF_PROMPTS + PROMPT_SCAFFOLD, 0.0
    if "off" in task.modes or example.reason is None:
        tokens, supervised = tokens + OFF_TOKENS, supervised + SUPERVISED_OF_OFF
    if "on" in task.modes and example.reason is not None:
        reason = len(example.reason) / CHARACTERS_OF_PROSE
        tokens += task.on_share * (reason + ON_SCAFFOLD)
        supervised += task.on_share * (reason + SUPERVISED_OF_ON_SCAFFOLD)
    return tokens, supervised
