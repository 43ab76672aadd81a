"""Score prompts with a guard: logit(malicious) - logit(benign) at the verdict position, never a number the model writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from guardtrain.data.template import GuardTemplate, VerdictIds
from guardtrain.inference.decoder import TreeDecoder
from guardtrain.types import Label, Mode, Turn


@dataclass(frozen=True, slots=True)
class Scored:
    """What a guard says of one prompt.

    scores: by mode, logit(malicious) - logit(benign).
    reason: the sentence written in mode `on`, else None.
    truncated: the reason hit the token cap and was closed by force.
    is_natural: in each mode, whether the most likely token of all at the verdict position is one of the labels, and in mode
    `on` whether the reason ended by itself; a free-running server would have given no verdict otherwise.
    """

    scores: dict[Mode, float]
    is_natural: dict[Mode, bool]
    reason: str | None = None
    truncated: bool = False


class Scorer:
    """Scores batches of prompts; the policy is computed once.

    model: causal language model; template: built for its tokenizer; tokenizer: for reading reasons back.
    max_reason_tokens: a reason is closed after this many tokens. pack_tokens: prompts of one batch hold at most so many.
    """

    def __init__(
        self, model: Any, tokenizer: Any, template: GuardTemplate, *, max_reason_tokens: int = 64, pack_tokens: int = 1024
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_reason_tokens = max_reason_tokens
        self.pack_tokens = pack_tokens
        model.eval()
        self.decoder = TreeDecoder(model, template.policy_ids)

    def score(self, prompts: Sequence[tuple[Turn, ...]], modes: Sequence[Mode]) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt, shortest first."""
        ids = [self.template.prompt_segment(prompt).input_ids for prompt in prompts]
        for batch in batches_by_length([len(row) for row in ids], self.pack_tokens):
            yield from zip(batch, self._score_batch([ids[index] for index in batch], modes), strict=True)

    def _score_batch(self, prompts: list[list[int]], modes: Sequence[Mode]) -> list[Scored]:
        self.decoder.start(len(prompts))
        self.decoder.extend(dict(enumerate(prompts)))
        scores: list[dict[Mode, float]] = [{} for _ in prompts]
        natural: list[dict[Mode, bool]] = [{} for _ in prompts]
        reasons: list[str | None] = [None] * len(prompts)
        truncated = [False] * len(prompts)
        if Mode.OFF in modes:
            self._read_verdicts(self.template.off_verdict, Mode.OFF, scores, natural)
        if Mode.ON in modes:
            reasons, truncated, ended = self._write_reasons(len(prompts))
            self._read_verdicts(self.template.on_verdict, Mode.ON, scores, natural, ended)
            for branch, was_cut in enumerate(truncated):
                natural[branch][Mode.ON] &= not was_cut
        return [
            Scored(scores=s, is_natural=n, reason=r, truncated=t)
            for s, n, r, t in zip(scores, natural, reasons, truncated, strict=True)
        ]

    def _read_verdicts(
        self,
        verdict: VerdictIds,
        mode: Mode,
        scores: list[dict[Mode, float]],
        natural: list[dict[Mode, bool]],
        ended: Sequence[int] | None = None,
    ) -> None:
        """Force the verdict prefix on every branch, note the score, and leave the branches as they were.

        ended: how many tokens of the prefix each branch has written itself.
        """
        prefixes = {branch: verdict.prefix[ended[branch] if ended else 0 :] for branch in range(len(scores))}
        logits_BV = self.decoder.extend(prefixes, keep=False)
        malicious, benign = (verdict.labels[label][0] for label in (Label.MALICIOUS, Label.BENIGN))
        score_B = (logits_BV[:, malicious] - logits_BV[:, benign]).tolist()
        natural_B = torch.isin(logits_BV.argmax(-1), torch.tensor([malicious, benign], device=logits_BV.device)).tolist()
        for branch, (score, is_natural) in enumerate(zip(score_B, natural_B, strict=True)):
            scores[branch][mode], natural[branch][mode] = score, is_natural

    def _write_reasons(self, num_branches: int) -> tuple[list[str | None], list[bool], list[int]]:
        """Write one reason on every branch, greedily, until it closes its think block or reaches the cap.

        Returns the reasons, which of them were cut, and how many tokens of the closing each branch's cache holds: all of
        `reason_end` but the last, for the token that completes it is not computed any more.
        """
        stops, end = self.template.reason_stops(), self.template.reason_end()
        written: list[list[int]] = [[] for _ in range(num_branches)]
        cut = [False] * num_branches
        ended = [0] * num_branches
        active = dict.fromkeys(range(num_branches), self.template.opening_ids)
        while active:
            logits_BV = self.decoder.extend(active)
            following = dict(zip(active, logits_BV.argmax(-1).tolist(), strict=True))
            active = {}
            for branch, token in following.items():
                if token in stops:
                    continue
                written[branch].append(token)
                if written[branch][-len(end) :] == end:
                    del written[branch][-len(end) :]
                    ended[branch] = len(end) - 1
                elif self._may_go_on(written[branch], end):
                    active[branch] = [token]
                else:
                    cut[branch] = True
                    written[branch].pop()
        return [self.tokenizer.decode(ids).strip() for ids in written], cut, ended

    def _may_go_on(self, written: list[int], end: list[int]) -> bool:
        """Below the cap, or beyond it with nothing but the beginning of an end."""
        beyond = written[self.max_reason_tokens :]
        return beyond == end[: len(beyond)]


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in ascending length, in runs whose lengths add up to at most `budget`; a longer one stands alone."""
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not batches or lengths[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches
