"""Conversations in every usual spelling (OpenAI `messages`, ShareGPT `conversations`) to turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardtrain.types import Turn

ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
CALL_KEYS = ("tool_calls", "function_call")


class BrokenTurns(ValueError):
    """A value that is no text and no list of turns; the message says why, without the text."""


def read_turns(value: Any) -> tuple[Turn, ...]:
    """The turns of a text (one user turn) or of a list of ``{role, content}`` or ``{from, value}``.

    Raises BrokenTurns. Blank turns are kept: the caller knows whether they may be.
    """
    if isinstance(value, str):
        return (Turn("user", checked_text(value)),)
    if not isinstance(value, Sequence):
        raise BrokenTurns(f"expected a text or a list of turns, found {'nothing' if value is None else type(value).__name__}")
    return tuple(_turn(number, item) for number, item in enumerate(value, start=1))


def checked_text(text: str) -> str:
    """`text`, unless UTF-8 cannot express it: JSON may hold half of a surrogate pair, and tokenizers crash on it later."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenTurns(f"half of a surrogate pair at character {error.start + 1}: not a valid text") from error
    return text


def is_blank(turns: Sequence[Turn]) -> bool:
    """Whether there is nothing to read in any turn."""
    return not any(turn.content.strip() for turn in turns)


def chat_fault(turns: Sequence[Turn]) -> str | None:
    """Why these turns cannot be trained on, or None. The order is: [system], user, assistant, (user | tool, assistant)…

    Turns after the last answer are allowed; they are never supervised.
    """
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        return "expected at least one assistant turn with text, found none"
    previous = "start"
    for number, turn in enumerate(turns, start=1):
        if turn.role not in FOLLOWERS[previous]:
            after = "at the start" if previous == "start" else f"after {previous}"
            return f"turn {number}: expected {' or '.join(FOLLOWERS[previous])} {after}, found {turn.role}"
        if not turn.content.strip():
            return f"turn {number} ({turn.role}) is empty"
        previous = turn.role
    return None


FOLLOWERS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _turn(number: int, item: Any) -> Turn:
    if not isinstance(item, dict):
        raise BrokenTurns(f"turn {number}: expected an object with role and content, found {type(item).__name__}")
    for key in CALL_KEYS:
        if item.get(key):
            raise BrokenTurns(f"turn {number} holds {key}, which is not text: write the call into content")
    role_key, text_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    role = ROLES.get(str(item.get(role_key, "")).strip().lower())
    if role is None:
        raise BrokenTurns(
            f"turn {number}: {role_key}: expected one of {', '.join(ROLES)}, found {str(item.get(role_key))[:20]!r}"
        )
    return Turn(role, _content(number, item.get(text_key)))


def _content(number: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return checked_text(content)
    if isinstance(content, Sequence):  # OpenAI's list of parts
        return "\n".join(_part(number, part) for part in content)
    raise BrokenTurns(f"turn {number}: expected a text, found {type(content).__name__}")


def _part(number: int, part: Any) -> str:
    if isinstance(part, str):
        return checked_text(part)
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return checked_text(part["text"])
    raise BrokenTurns(f"turn {number} holds a part that is not text (an image or a file)")
