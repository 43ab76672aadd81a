"""From what a caller sends to the pieces that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guardtrain.data.template import PlainText
from guardtrain.data.turns import BrokenTurns, read_turns
from guardtrain.errors import ModelError
from guardtrain.inference.chunks import chunk_prompt
from guardtrain.inference.normalise import readings
from guardtrain.inference.scored import Prompt
from guardtrain.serve.verdict import Failure
from guardtrain.types import Turn, prompt_text

UnreadPrompt = str | Sequence[Mapping[str, Any] | Turn]


class Refused(Exception):
    """A prompt that the model is not asked about; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def turns_of(prompt: UnreadPrompt) -> Prompt:
    """The turns of a text or a conversation. Raises Refused for what is neither, and for content that is no text."""
    try:
        return read_turns(prompt if isinstance(prompt, str) else [_as_dict(turn) for turn in prompt])
    except (BrokenTurns, TypeError, ValueError) as error:
        raise Refused(Failure.UNREADABLE) from error


def _as_dict(turn: Mapping[str, Any] | Turn) -> dict[str, Any]:
    return {"role": turn.role, "content": turn.content} if isinstance(turn, Turn) else dict(turn)


def pieces_of(
    prompt: Prompt, encoder: PlainText, *, chunk_tokens: int, max_tokens: int, max_characters: int, normalise: bool
) -> list[Prompt]:
    """What the model reads of a prompt: it normalised, what was hidden in it once more, each in chunks. At least one piece.

    Raises Refused for a prompt that is too long, before or behind normalisation.
    """
    if sum(len(turn.content) for turn in prompt) > max_characters:
        raise Refused(Failure.TOO_LONG)
    read = readings(prompt) if normalise else [prompt]
    try:
        if sum(len(encoder.plain(prompt_text(each))) for each in read) > max_tokens:
            raise Refused(Failure.TOO_LONG)
        return [piece for each in read for piece in chunk_prompt(each, encoder, chunk_tokens)]
    except ModelError as error:  # plain text that the tokenizer takes for a special token
        raise Refused(Failure.UNREADABLE) from error
