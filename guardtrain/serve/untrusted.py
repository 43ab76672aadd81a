"""What of a request nobody has vouched for: the texts that a guard has to read, each by itself. Pure.

What is forwarded later must be what was read here, so everything in an untrusted turn that could reach a model counts: parts of
its content, and text under names that this module has never heard of. What cannot be read is said to be unreadable, not skipped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guardtrain.data.turns import ROLES, BrokenTurns, checked_text
from guardtrain.types import Turn

UNTRUSTED = frozenset({"user", "tool"})
# Of a turn: what is never shown to a model as text, or is read on its own.
_PLAIN_KEYS = frozenset({"role", "content", "type", "id", "tool_call_id", "call_id", "status", "cache_control"})
_TEXT_TYPES = frozenset({"text", "input_text"})
_TEXT_KEYS = frozenset({"type", "text", "cache_control"})
NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")  # a longer one has room for an order whose words are joined
# What the Responses API calls the model's own doing; everything else that it lists came from outside.
_OWN_ITEMS = frozenset({"reasoning", "item_reference"})


@dataclass(frozen=True, slots=True)
class Piece:
    """One text to be judged by itself. where: its address in the request. text: None for content that is no text."""

    where: str
    role: str
    text: str | None

    @property
    def prompt(self) -> str | tuple[Turn, ...]:
        """As `Guard.check` takes it."""
        text = self.text or ""
        return text if self.role == "user" else (Turn(self.role, text),)


def piece(where: str, role: str, text: str) -> Piece:
    """A text; half of a surrogate pair makes it unreadable."""
    try:
        return Piece(where, role, checked_text(text))
    except BrokenTurns:
        return Piece(where, role, None)


def in_messages(messages: Sequence[Mapping[str, Any]], roles: Collection[str] = UNTRUSTED) -> list[Piece]:
    """Of OpenAI's chat messages: the turns of these roles, and of roles that nobody knows."""
    return [found for number, message in enumerate(messages) for found in _in_message(message, f"messages[{number}]", roles)]


def is_trusted(message: Mapping[str, Any], roles: Collection[str] = UNTRUSTED) -> bool:
    """Whether a turn is of a role that is known and not to be checked."""
    role = ROLES.get(_role(message))
    return role is not None and role not in roles


def in_parts(parts: Sequence[Any], where: str, role: str = "user") -> list[Piece]:
    """Of a list of content parts: their texts as one, and once more, without a text, where a part is something else."""
    texts = [part if isinstance(part, str) else part["text"] for part in parts if _is_text(part)]
    found = [piece(where, role, "\n".join(texts))] if any(text.strip() for text in texts) else []
    return found if len(texts) == len(parts) else [*found, Piece(where, role, None)]


def in_input(value: Any, roles: Collection[str] = UNTRUSTED) -> list[Piece]:
    """Of `input` in the Responses API: a text, or a list of turns, tool results and other items."""
    if not isinstance(value, list):
        return _in_content(value, "input", "user")
    return [found for number, item in enumerate(value) for found in _in_item(item, f"input[{number}]", roles)]


def in_anything(value: Any, where: str = "body") -> list[Piece]:
    """Of JSON whose form is not known: all its texts as one."""
    text = "\n".join(texts_in(value))
    return [piece(where, "user", text)] if text.strip() else []


def texts_in(value: Any) -> Iterator[str]:
    """Every text in nested JSON, in its order; names of fields are left out."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, Mapping):
            waiting.extend(reversed(list(found.values())))
        elif isinstance(found, list):
            waiting.extend(reversed(found))


def _in_item(item: Any, where: str, roles: Collection[str]) -> list[Piece]:
    if not isinstance(item, Mapping):
        return _in_content(item, where, "user")
    kind = str(item.get("type", "message"))
    if kind.endswith("_output"):
        return [*_in_content(item.get("output"), where, "tool"), *_beside(item, where, "tool", {"output"})]
    if kind == "message":
        return _in_message(item, where, roles)
    return [] if kind in _OWN_ITEMS or kind.endswith("_call") else in_anything(item, where)


def _in_message(message: Mapping[str, Any], where: str, roles: Collection[str]) -> list[Piece]:
    if is_trusted(message, roles):
        return []
    role = ROLES.get(_role(message), "user")
    return [*_in_content(message.get("content"), where, role), *_beside(message, where, role)]


def _role(message: Mapping[str, Any]) -> str:
    return str(message.get("role", "")).strip().lower()


def _in_content(content: Any, where: str, role: str) -> list[Piece]:
    if content is None:
        return []
    if isinstance(content, str):
        return [piece(where, role, content)] if content.strip() else []
    return in_parts(content, where, role) if isinstance(content, list) else [Piece(where, role, None)]


def _beside(message: Mapping[str, Any], where: str, role: str, known: Collection[str] = ()) -> list[Piece]:
    """Texts of a turn that stand beside its content: a chat template may show them."""
    rest = {key: value for key, value in message.items() if key not in _PLAIN_KEYS and key not in known}
    if isinstance(rest.get("name"), str) and NAME.fullmatch(rest["name"]):
        del rest["name"]
    text = "\n".join(texts_in(rest))
    return [piece(where, role, text)] if text.strip() else []


def _is_text(part: Any) -> bool:
    if isinstance(part, str):
        return True
    has_text = isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") in _TEXT_TYPES
    return has_text and part.keys() <= _TEXT_KEYS
