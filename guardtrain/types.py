"""The nouns of the package. Pure data: no torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Label(StrEnum):
    """The verdict that a guard gives, and the label of a row."""

    MALICIOUS = "malicious"
    BENIGN = "benign"


class Mode(StrEnum):
    """How a guard answers: `off` gives the verdict at once, `on` writes one sentence of reasoning first."""

    OFF = "off"
    ON = "on"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. `role` is the data's own word: user, assistant, tool, system."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardExample:
    """One labelled prompt.

    prompt: the untrusted text; one user turn, or a conversation.
    reason: one sentence that says what is special about it, or None (the row then trains mode `off` only).
    pair: rows of one minimal pair share this name and are never split between training and validation.
    where: ``file:line``, for messages.
    """

    prompt: tuple[Turn, ...]
    label: Label
    reason: str | None = None
    id: str = ""
    source: str = ""
    category: str = ""
    pair: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatExample:
    """One conversation for instruct tuning; assistant turns are the supervised ones."""

    turns: tuple[Turn, ...]
    id: str = ""
    source: str = ""
    where: str = ""


Example = GuardExample | ChatExample


def prompt_text(prompt: tuple[Turn, ...]) -> str:
    """The prompt as one text: a lone user turn as it is, otherwise each turn under its role."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"[{turn.role}]\n{turn.content}" for turn in prompt)
