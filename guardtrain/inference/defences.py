"""What may stand between a prompt and the scorer: normalised reading, chunks, or both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from guardtrain.inference.chunks import ChunkingScorer, PromptScorer, score_worst
from guardtrain.inference.guards import Guard
from guardtrain.inference.normalise import readings
from guardtrain.inference.scorer import Scored
from guardtrain.types import Mode, Turn


class NormalisingScorer:
    """A scorer that reads prompts normalised, and what was hidden in them by itself too: the worst of these counts."""

    def __init__(self, scorer: PromptScorer) -> None:
        self.scorer = scorer

    def score(self, prompts: Sequence[tuple[Turn, ...]], modes: Sequence[Mode]) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt."""
        return score_worst(self.scorer, [readings(prompt) for prompt in prompts], modes)


def defended_scorer(
    guard: Guard, *, normalise: bool = True, chunk_tokens: int | None = None, pack_tokens: int = 1024
) -> PromptScorer:
    """A guard's scorer behind its defences; what was decoded is there before the text is cut.

    chunk_tokens: the longest chunk, None for whole prompts. Raises ConfigError for chunks too short.
    """
    scorer: PromptScorer = guard.scorer(pack_tokens)
    if chunk_tokens is not None:
        scorer = ChunkingScorer(scorer, guard.template.encoder, chunk_tokens)
    return NormalisingScorer(scorer) if normalise else scorer
