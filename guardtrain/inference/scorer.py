"""Score prompts with a guard: logit(malicious) - logit(benign) at the verdict position, never a number the model writes.

What a batch changes. The same prompt in another batch gets the same reason: where two tokens are so near each other that
rounding could swap them, the choice is made from a forward of that branch alone, which no batch changes. Its scores agree
to about 1e-5 in float32 (2026-11, on a CPU: SmolLM2-135M 1.2e-5, tiny models 3e-6): kernels add up in another order for
another shape, and equal bits would need a forward of each prompt alone. The same batch gives the same bits, on one rank or
several. In bfloat16 rounding is as wide as the gaps between tokens are: there a reason may depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from guardtrain.data.keys import seeded_rank
from guardtrain.data.template import GuardTemplate, VerdictIds
from guardtrain.errors import ConfigError
from guardtrain.inference.decoder import TreeDecoder
from guardtrain.inference.reason import Reason
from guardtrain.inference.scored import Prompt, Scored
from guardtrain.types import Label, Mode, prompt_text

# Logits this near to the best are a tie in float32: many times what a batch was seen to move them by.
TIE = 1e-3


class _Noise:
    """Gumbel noise from a seed: the best of logits / temperature + noise is a draw from the softmax.

    Source: Maddison, Tarlow and Minka, A* Sampling, 2014. Each draw belongs to a prompt, a sample and a step, so a batch does not
    change it.
    """

    def __init__(self, seed: int, temperature: float) -> None:
        self.temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)
        self._noise_V = torch.empty(0)

    def draw(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Perturbed logits, with new noise."""
        exponential_V = torch.empty(len(logits_V)).exponential_(generator=self._generator)
        self._noise_V = -exponential_V.log().to(logits_V.device)
        return self.again(logits_V)

    def again(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Perturbed logits, with the noise that was drawn last."""
        return logits_V / self.temperature + self._noise_V


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
        self._tie = TIE if next(model.parameters()).dtype is torch.float32 else 0.0

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt behind the policy."""
        return [len(self.template.prompt_segment(prompt).input_ids) for prompt in prompts]

    def score(
        self,
        prompts: Sequence[Prompt],
        modes: Collection[Mode],
        *,
        escalates: Callable[[float], bool] | None = None,
        batches: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt, shortest first.

        escalates: of the score in mode `off`, whether mode `on` is run too, behind the prompt that is in the cache; all prompts
        if absent. batches: indices of the prompts that are scored, as `batches_by_length` groups all of them; all if absent.
        """
        try:
            for batch in self._batches(prompts) if batches is None else batches:
                yield from zip(batch, self._score_batch([prompts[index] for index in batch], modes, escalates), strict=True)
        finally:
            self.decoder.start(0)

    def sample(
        self, prompts: Sequence[Prompt], *, samples: int, temperature: float = 1.0, seed: int = 0
    ) -> Iterator[tuple[int, list[Scored]]]:
        """Yield (index, `samples` results) for every prompt: reasons drawn at `temperature`, each with its score in mode `on`.

        A draw depends on the seed, the prompt's text and the sample's number alone: neither the batch nor the other prompts
        change it (see the module for what rounding may do). Raises ConfigError.
        """
        if samples < 1 or not temperature > 0:
            expected, found = "at least one sample, a temperature above 0", f"{samples} at {temperature}"
            raise ConfigError("nothing can be sampled", where="samples", expected=expected, found=found)
        try:
            for batch in self._batches(prompts):
                yield from zip(
                    batch, self._sample_batch([prompts[index] for index in batch], samples, temperature, seed), strict=True
                )
        finally:
            self.decoder.start(0)

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return batches_by_length(self.lengths(prompts), self.pack_tokens)

    def _score_batch(
        self, prompts: list[Prompt], modes: Collection[Mode], escalates: Callable[[float], bool] | None
    ) -> list[Scored]:
        self._read(prompts)
        scored = [Scored({}, {}) for _ in prompts]
        on = list(range(len(prompts))) if Mode.ON in modes else []
        if Mode.OFF in modes:
            for branch, (score, is_natural) in self._verdicts(self.template.off_verdict, dict.fromkeys(range(len(prompts)), 0)):
                scored[branch].scores[Mode.OFF], scored[branch].is_natural[Mode.OFF] = score, is_natural
            on = [branch for branch in on if escalates is None or escalates(scored[branch].scores[Mode.OFF])]
        self.decoder.drop(set(range(len(prompts))).difference(on))
        reasoned = self._reason(on)
        return [row.joined(reasoned.get(branch)) for branch, row in enumerate(scored)]

    def _sample_batch(self, prompts: list[Prompt], samples: int, temperature: float, seed: int) -> list[list[Scored]]:
        self._read(prompts)
        forks = [self.decoder.fork(branch, samples) for branch in range(len(prompts))]
        noises = {
            branch: _Noise(seeded_rank(seed, f"{number}\0{prompt_text(prompt)}"), temperature)
            for prompt, branches in zip(prompts, forks, strict=True)
            for number, branch in enumerate(branches)
        }
        reasoned = self._reason(list(noises), noises)
        return [[reasoned[branch] for branch in branches] for branches in forks]

    def _read(self, prompts: list[Prompt]) -> None:
        self.decoder.read([self.template.prompt_segment(prompt).input_ids for prompt in prompts])

    def _reason(self, branches: Sequence[int], noises: Mapping[int, _Noise] | None = None) -> dict[int, Scored]:
        """Write a reason on each of these branches, then force the verdict's prefix: mode `on`, by branch."""
        reasons = {branch: Reason.of(self.template, self.max_reason_tokens) for branch in branches}
        results: dict[int, Scored] = {}
        active = dict.fromkeys(branches, self.template.opening_ids)
        while active:
            logits_BV = self.decoder.extend(active)
            tokens = self._likeliest(logits_BV, {branch: [] for branch in active}, noises)
            active = {branch: [token] for branch, token in zip(active, tokens, strict=True) if reasons[branch].take(token)}
            ended = {branch: reasons[branch] for branch in branches if branch not in active and branch not in results}
            # Each step attends past all that is held: half of it has to go on, or the rest is judged and let go of.
            if len(ended) >= len(active):
                results |= self._judge(ended)
                self.decoder.drop(ended)
        return results

    def _judge(self, reasons: dict[int, Reason]) -> dict[int, Scored]:
        """Mode `on` of branches whose reasons have ended."""
        results = {}
        held = {branch: reason.held for branch, reason in reasons.items()}
        for branch, (score, is_natural) in self._verdicts(self.template.on_verdict, held):
            reason = reasons[branch]
            text = self.tokenizer.decode(reason.ids).strip()
            results[branch] = Scored({Mode.ON: score}, {Mode.ON: is_natural and not reason.is_cut}, text, reason.is_cut)
        return results

    def _verdicts(self, verdict: VerdictIds, held: dict[int, int]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Force the verdict prefix on branches and leave them as they were; yield each with its score and naturalness.

        held: by branch, how many tokens of the prefix it has already.
        """
        prefixes = {branch: verdict.prefix[number:] for branch, number in held.items()}
        logits_BV = self.decoder.extend(prefixes, keep=False)
        malicious, benign = (verdict.labels[label][0] for label in (Label.MALICIOUS, Label.BENIGN))
        score_B = (logits_BV[:, malicious] - logits_BV[:, benign]).tolist()
        likeliest_B = self._likeliest(logits_BV, prefixes)
        for branch, score, likeliest in zip(prefixes, score_B, likeliest_B, strict=True):
            yield branch, (score, likeliest in {malicious, benign})

    def _likeliest(
        self, logits_BV: torch.Tensor, ahead: dict[int, list[int]], noises: Mapping[int, _Noise] | None = None
    ) -> list[int]:
        """The likeliest token behind each branch and `ahead`, under its noise if it has one; ties are broken alone."""
        if noises:
            logits_BV = torch.stack([noises[branch].draw(row_V) for branch, row_V in zip(ahead, logits_BV, strict=True)])
        best_B, token_B = logits_BV.max(-1)
        tokens: list[int] = token_B.tolist()
        is_tied_B = (logits_BV > best_B[:, None] - self._tie).sum(-1) > 1
        for row, (branch, ids) in enumerate(ahead.items()):
            if is_tied_B[row]:
                alone_V = self.decoder.alone(branch, ids)
                tokens[row] = int((noises[branch].again(alone_V) if noises else alone_V).argmax())
        return tokens


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
