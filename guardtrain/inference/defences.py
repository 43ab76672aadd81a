"""What may stand between a prompt and the scorer: normalised reading, chunks, or both; and a memory of what was scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from guardtrain.data.template import PlainText
from guardtrain.inference.chunks import ChunkingScorer, PromptScorer, score_worst
from guardtrain.inference.normalise import readings
from guardtrain.inference.scored import Scored
from guardtrain.types import Mode, Turn


class NormalisingScorer:
    """A scorer that reads prompts normalised, and what was hidden in them by itself too: the worst of these counts."""

    def __init__(self, scorer: PromptScorer) -> None:
        self.scorer = scorer

    def score(self, prompts: Sequence[tuple[Turn, ...]], modes: Sequence[Mode]) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt."""
        return score_worst(self.scorer, [readings(prompt) for prompt in prompts], modes)


class RememberingScorer:
    """A scorer that scores a prompt once for the same modes, however often it is asked: several defences read most prompts alike.

    It forgets nothing: for a known number of prompts.
    """

    def __init__(self, scorer: PromptScorer) -> None:
        self.scorer = scorer
        self._known: dict[tuple[Mode, ...], dict[tuple[Turn, ...], Scored]] = defaultdict(dict)

    def score(self, prompts: Sequence[tuple[Turn, ...]], modes: Sequence[Mode]) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt."""
        known = self._known[tuple(modes)]
        waiting = defaultdict(list)
        for index, prompt in enumerate(prompts):
            if prompt in known:
                yield index, known[prompt]
            else:
                waiting[prompt].append(index)
        new = list(waiting)
        for number, scored in self.scorer.score(new, modes):
            known[new[number]] = scored
            for index in waiting[new[number]]:
                yield index, scored


def defended_scorer(
    scorer: PromptScorer, encoder: PlainText, *, normalise: bool = True, chunk_tokens: int | None = None
) -> PromptScorer:
    """A scorer behind defences; what was decoded is there before the text is cut.

    encoder: of the scorer's template. chunk_tokens: the longest chunk, None for whole prompts. Raises ConfigError for chunks too
    short.
    """
    if chunk_tokens is not None:
        scorer = ChunkingScorer(scorer, encoder, chunk_tokens)
    return NormalisingScorer(scorer) if normalise else scorer
