"""Long prompts in overlapping chunks, each scored by itself: an order in the middle of ten pages is then read on one page.

Shape suffix: T tokens of one text.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from guardtrain.data.template import PlainText
from guardtrain.errors import ConfigError
from guardtrain.inference.scored import Scored
from guardtrain.types import Mode, Turn, prompt_text

MIN_CHUNK_TOKENS = 32
OVERLAP = 8  # neighbours share one in so many tokens of a chunk

_SENTENCE_END = re.compile(r"[.!?。！？…]['\"”’)\]]*\s+|\n\s*|[。！？]")
_BLANK = re.compile(r"\s+")


class PromptScorer(Protocol):
    """What scores prompts: `Scorer`, and every wrapper of one."""

    def score(self, prompts: Sequence[tuple[Turn, ...]], modes: Sequence[Mode]) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt, in any order."""


class ChunkingScorer:
    """Scores a long prompt as the worst of its chunks; a prompt of at most `chunk_tokens` tokens goes through as it is.

    encoder: of the scorer's template. chunk_tokens: at least 32. Raises ConfigError for less.
    """

    def __init__(self, scorer: PromptScorer, encoder: PlainText, chunk_tokens: int) -> None:
        if chunk_tokens < MIN_CHUNK_TOKENS:
            raise ConfigError(
                "chunks too short to judge", expected=f"at least {MIN_CHUNK_TOKENS} tokens", found=str(chunk_tokens)
            )
        self.scorer, self.encoder, self.chunk_tokens = scorer, encoder, chunk_tokens

    def score(self, prompts: Sequence[tuple[Turn, ...]], modes: Sequence[Mode]) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt; see `worst` for what is kept of its chunks."""
        return score_worst(self.scorer, [chunk_prompt(prompt, self.encoder, self.chunk_tokens) for prompt in prompts], modes)


def score_worst(
    scorer: PromptScorer, parts: Sequence[Sequence[tuple[Turn, ...]]], modes: Sequence[Mode]
) -> Iterator[tuple[int, Scored]]:
    """Score every prompt in parts, at least one each: yield (index, `worst` of its parts) as soon as its last part is scored."""
    owners = [index for index, of_one in enumerate(parts) for _ in of_one]
    scored: dict[int, dict[int, Scored]] = defaultdict(dict)
    for number, part in scorer.score(list(itertools.chain.from_iterable(parts)), modes):
        index = owners[number]
        scored[index][number] = part
        if len(scored[index]) == len(parts[index]):
            yield index, worst([each for _, each in sorted(scored.pop(index).items())])


def worst(chunks: Sequence[Scored]) -> Scored:
    """One verdict of many chunks: the highest score of each mode, with that chunk's `is_natural`.

    The reason, and whether it was cut, are those of the chunk with the highest score in mode `on`. The first of equals wins.
    """
    top = {mode: max(chunks, key=lambda chunk: chunk.scores[mode]) for mode in chunks[0].scores}
    return replace(
        top.get(Mode.ON, chunks[0]),
        scores={mode: chunk.scores[mode] for mode, chunk in top.items()},
        is_natural={mode: chunk.is_natural[mode] for mode, chunk in top.items()},
    )


def chunk_prompt(prompt: tuple[Turn, ...], encoder: PlainText, chunk_tokens: int) -> list[tuple[Turn, ...]]:
    """The prompt in chunks of about `chunk_tokens` tokens at most; every character of every turn is in at least one.

    Consecutive turns share a chunk as long as they fit; a longer turn is cut, and each piece keeps its role.
    """
    if len(encoder.plain(prompt_text(prompt))) <= chunk_tokens:
        return [prompt]
    chunks: list[tuple[Turn, ...]] = []
    room = 0
    for piece in (piece for turn in prompt for piece in _pieces(turn, encoder, chunk_tokens)):
        needed = len(encoder.plain(f"[{piece.role}]\n{piece.content}\n\n"))
        if needed <= room:
            chunks[-1] += (piece,)
            room -= needed
        else:
            chunks.append((piece,))
            room = chunk_tokens - needed
    return chunks


def _pieces(turn: Turn, encoder: PlainText, chunk_tokens: int) -> list[Turn]:
    spans = chunk_spans(turn.content, encoder.starts(turn.content), chunk_tokens)
    return [Turn(turn.role, turn.content[start:end]) for start, end in spans]


def chunk_spans(text: str, starts_T: Sequence[int], chunk_tokens: int) -> list[tuple[int, int]]:
    """Character spans that cover `text` and overlap; pure.

    starts_T: the first character of each token, ascending. A span holds at most `chunk_tokens` of them and ends behind the last
    sentence, else the last word, of its final quarter; the next begins at a sentence or word an eighth of a chunk earlier.
    """
    spans: list[tuple[int, int]] = []
    first_token, first_character = 0, 0
    while len(starts_T) - first_token > chunk_tokens:
        last = first_token + chunk_tokens
        end = _boundary(text, starts_T[last - chunk_tokens // 4], starts_T[last])
        spans.append((first_character, end))
        behind = max(first_token, bisect_left(starts_T, end) - chunk_tokens // OVERLAP)
        before = max(first_token, behind - chunk_tokens // OVERLAP)
        first_character = _boundary(text, starts_T[before], starts_T[behind])
        first_token = max(first_token + 1, bisect_left(starts_T, first_character))
    return [*spans, (first_character, len(text))]


def _boundary(text: str, low: int, high: int) -> int:
    """The last place in (low, high] where a sentence, else a word, begins; `high` where there is neither."""
    for pattern in (_SENTENCE_END, _BLANK):
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        if ends:
            return ends[-1]
    return high
