"""What a server and its model process say to each other, as JSON: prompts are data there, and nothing is ever evaluated."""

from __future__ import annotations

import json
from typing import Any

from guardtrain.inference.scored import Question, Scored
from guardtrain.serve.engine import Ask, Drop
from guardtrain.types import Mode, Turn


def pack(message: dict[str, Any]) -> bytes:
    """A message as bytes."""
    return json.dumps(message).encode()


def pack_order(order: Ask | Drop) -> bytes:
    """An order to the model process."""
    if isinstance(order, Drop):
        return pack({"drop": order.name})
    question = {"modes": sorted(order.question.modes), "band": order.question.band}
    return pack({"ask": order.name, "prompt": [[turn.role, turn.content] for turn in order.prompt], **question})


def unpack_order(data: bytes) -> Ask | Drop:
    """The inverse of `pack_order`."""
    tree = json.loads(data)
    if "drop" in tree:
        return Drop(tree["drop"])
    band = tuple(tree["band"]) if tree["band"] else None
    question = Question(frozenset(map(Mode, tree["modes"])), band)
    return Ask(tree["ask"], tuple(Turn(role, content) for role, content in tree["prompt"]), question)


def pack_done(finished: list[tuple[int, Scored]]) -> bytes:
    """What is done, or a sign of life where nothing is."""
    done = [[name, each.scores, each.is_natural, each.reason, each.truncated] for name, each in finished]
    return pack({"done": done})


def unpack_done(tree: dict[str, Any]) -> list[tuple[int, Scored]]:
    """The inverse of `pack_done`, of its JSON."""
    return [
        (name, Scored(_by_mode(scores), _by_mode(is_natural), reason, truncated))
        for name, scores, is_natural, reason, truncated in tree["done"]
    ]


def _by_mode(tree: dict[str, Any]) -> dict[Mode, Any]:
    return {Mode(mode): value for mode, value in tree.items()}
