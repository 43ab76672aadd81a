"""Score prompts that come one by one: each joins the others between two tokens, and leaves as soon as it has its verdict.

A prompt is read in one forward, together with what forces its verdict in mode `off` and what opens its reason in mode `on`.
Reasons are then written row by row (see `rows`), all of them one token further with each step; a reason's closing and its
verdict ride along with the others' tokens. Scores are those of `Scorer` but for their last bits, reasons the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from guardtrain.data.template import GuardTemplate, VerdictIds
from guardtrain.inference.decoder import TreeDecoder
from guardtrain.inference.inputs import Inputs, run_both
from guardtrain.inference.lean import is_lean
from guardtrain.inference.reason import Reason
from guardtrain.inference.rows import ATTENTION, RowDecoder
from guardtrain.inference.scored import Question, Scored
from guardtrain.inference.scorer import TIE
from guardtrain.types import Label, Mode

Finished = list[tuple[int, Scored]]
Asked = tuple[int, list[int], Question]
# Rows are as long as the longest: so many tokens in all, or one prompt alone. In float32 46 kB each for SmolLM2-135M.
ROW_TOKENS = 16_384
SLICE_TOKENS = 512  # of a long prompt are read at once: reasons go on in between, and whoever waits can see that it lives


@dataclass
class _Writing:
    """A reason that is being written. ids: all that was read of this branch. next: is read next, at last the verdict's prefix."""

    off: Scored
    reason: Reason
    ids: list[int]
    next: list[int] = field(default_factory=list)
    is_closing: bool = False


@dataclass(frozen=True)
class _Part:
    """A part of a forward, and what is made of its logits."""

    inputs: Inputs
    finish: Callable[[torch.Tensor], Finished]


class LiveScorer:
    """Scores prompts under names of the caller's, in float32 to within 1e-4 of what `Scorer` says.

    model: a transformers causal language model, whose attention is replaced. It is used from one thread at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, template: GuardTemplate, *, max_reason_tokens: int = 64) -> None:
        model.eval()
        model.set_attn_implementation(ATTENTION)
        self.tokenizer = tokenizer
        self.template = template
        self.max_reason_tokens = max_reason_tokens
        self._reader = TreeDecoder(model, template.policy_ids)
        self._rows = RowDecoder(model, self._reader.policy_layers)
        self._writing: dict[int, _Writing] = {}
        self._long: tuple[Asked, int] | None = None
        self._is_lean = is_lean(model)
        self._tie = TIE if next(model.parameters()).dtype is torch.float32 else 0.0

    def __len__(self) -> int:
        """Reasons that are being written."""
        return len(self._writing)

    @property
    def is_reading(self) -> bool:
        """Whether the rest of a long prompt is to be read before anything else can be."""
        return self._long is not None

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether reasons behind prompts of so many tokens could be written beside those that are; one alone always can."""
        longest = max(self._rows.longest, *lengths) + self.max_reason_tokens
        return (len(self) + len(lengths)) * longest <= ROW_TOKENS or len(self) + len(lengths) == 1

    def read(self, prompts: Sequence[Asked]) -> Finished:
        """Read prompts in one forward: (name, its tokens behind the policy, what is asked). Returns those that are done.

        Of a lone prompt of more than SLICE_TOKENS the beginning is read; `read_on` reads the rest.
        """
        return self._forward(self._begin(prompts), None)

    def read_on(self) -> Finished:
        """Read the next part of a long prompt."""
        return self._forward(self._go_on(), None)

    def step(self) -> Finished:
        """Write one more token of every reason that is being written. Returns those that are done."""
        return self._forward(None, self._write())

    def turn(self, prompts: Sequence[Asked]) -> Finished:
        """Read these prompts, or the next part of a long one, and write one token of each reason; a lean model in one forward."""
        reading = self._go_on() if self.is_reading else self._begin(prompts) if prompts else None
        return self._forward(reading, self._write())

    @torch.inference_mode()
    def _forward(self, reading: _Part | None, writing: _Part | None) -> Finished:
        if reading and writing and self._is_lean:
            of_reading, of_writing = run_both(self._rows.model, reading.inputs, writing.inputs)
            return reading.finish(of_reading) + writing.finish(of_writing)
        return [each for part in (writing, reading) if part for each in part.finish(part.inputs.run(self._rows.model))]

    @torch.inference_mode()
    def _begin(self, prompts: Sequence[Asked]) -> _Part:
        self._reader.start(len(prompts))
        self._long = prompts[0], 0
        return self._go_on() if len(prompts) == 1 else self._all(prompts, [ids for _, ids, _ in prompts])

    @torch.inference_mode()
    def _go_on(self) -> _Part:
        assert self._long is not None
        asked, start = self._long
        rest = asked[1][start:]
        if len(rest) > SLICE_TOKENS:
            self._long = asked, start + SLICE_TOKENS
            return _Part(self._reader.inputs({0: rest[:SLICE_TOKENS]}, heads=()), lambda logits_BV: [])
        return self._all([asked], [rest])

    def _all(self, prompts: Sequence[Asked], unread: Sequence[list[int]]) -> _Part:
        """What is unread of each prompt, and behind it what its question needs."""
        self._long = None
        branches = range(len(prompts))
        off = {branch: self._reader.fork(branch, 1)[0] for branch in branches if Mode.OFF in prompts[branch][2].modes}
        on = {branch: self._reader.fork(branch, 1)[0] for branch in branches if prompts[branch][2].always_reasons}
        tokens: dict[int, list[int]] = {}
        for branch, ids in enumerate(unread):
            tokens[branch] = ids
            tokens |= {off[branch]: self.template.off_verdict.prefix} if branch in off else {}
            tokens |= {on[branch]: self.template.opening_ids} if branch in on else {}
        heads = [fork for fork in tokens if fork >= len(prompts)]

        def finish(logits_BV: torch.Tensor) -> Finished:
            logits = dict(zip(heads, logits_BV, strict=True))
            finished: Finished = []
            for branch, (name, ids, question) in enumerate(prompts):
                scored = Scored({}, {})
                if branch in off:
                    scored = self._verdict(Mode.OFF, self.template.off_verdict, logits[off[branch]])
                if not question.escalates(scored.scores.get(Mode.OFF, 0.0)):
                    finished.append((name, scored))
                    continue
                each = self._open(name, ids, scored, [branch, *([on[branch]] if branch in on else [])])
                if branch in on:  # its opening was read too
                    each.ids += each.next
                    self._take(each, logits[on[branch]])
            return finished

        return _Part(self._reader.inputs(tokens, heads=heads), finish)

    @torch.inference_mode()
    def _write(self) -> _Part | None:
        """The next token of every reason that is being written."""
        if not self._writing:
            return None
        tokens = {name: each.next for name, each in self._writing.items()}

        def finish(logits_RV: torch.Tensor) -> Finished:
            finished = []
            for name, logits_V in zip(tokens, logits_RV, strict=True):
                each = self._writing[name]
                each.ids += each.next
                if each.is_closing:
                    finished.append((name, self._judged(each, logits_V)))
                else:
                    self._take(each, logits_V)
            self.drop([name for name, _ in finished])
            return finished

        return _Part(self._rows.inputs(tokens), finish)

    def drop(self, names: Collection[int]) -> None:
        """Read and write no further at these, and forget them."""
        if self._long is not None and self._long[0][0] in names:
            self._long = None
        for name in names:
            if self._writing.pop(name, None):
                self._rows.drop(name)

    def _open(self, name: int, ids: list[int], off: Scored, branches: list[int]) -> _Writing:
        """Begin a reason behind a prompt that was just read, whose opening is to be read next."""
        self._rows.add(name, self._reader.held(branches))
        self._writing[name] = _Writing(
            off, Reason.of(self.template, self.max_reason_tokens), list(ids), self.template.opening_ids
        )
        return self._writing[name]

    def _take(self, each: _Writing, logits_V: torch.Tensor) -> None:
        token = self._likeliest(each.ids, logits_V)
        if each.reason.take(token):
            each.next = [token]
        else:
            each.next = self.template.on_verdict.prefix[each.reason.held :]
            each.is_closing = True

    def _judged(self, each: _Writing, logits_V: torch.Tensor) -> Scored:
        on = self._verdict(Mode.ON, self.template.on_verdict, logits_V)
        text = self.tokenizer.decode(each.reason.ids).strip()
        is_natural = {Mode.ON: on.is_natural[Mode.ON] and not each.reason.is_cut}
        return each.off.joined(Scored(on.scores, is_natural, text, each.reason.is_cut))

    def _verdict(self, mode: Mode, verdict: VerdictIds, logits_V: torch.Tensor) -> Scored:
        malicious, benign = (verdict.labels[label][0] for label in (Label.MALICIOUS, Label.BENIGN))
        score = float(logits_V[malicious] - logits_V[benign])
        return Scored({mode: score}, {mode: int(logits_V.argmax()) in {malicious, benign}})

    def _likeliest(self, ids: list[int], logits_V: torch.Tensor) -> int:
        """The likeliest next token; of a tie, what this branch says alone, so that no batch changes a reason."""
        best, second = logits_V.topk(2).values.tolist()
        if best - second >= self._tie:
            return int(logits_V.argmax())
        return int(self._reader.apart(ids).argmax())
