"""The interface of Scorer over vLLM, for guards on GPUs that serve many rows: `pip install guardtrain[vllm]`.

Unmeasured: no machine of ours had vLLM. What is ours (token ids in, scores out) is tested; that the engine's numbers equal those
of Scorer is not. 2026-11: written after vLLM 0.30, whose SamplingParams know `logprob_token_ids`.

The engine caches the policy and each prompt (prefix caching), so that mode `on` costs a prompt no second reading. Its
log-probabilities are those of the whole vocabulary, and the difference of two of them is the difference of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from guardtrain.data.template import GuardTemplate, VerdictIds
from guardtrain.errors import ModelError
from guardtrain.inference.reason import Reason
from guardtrain.inference.scored import Prompt, Scored
from guardtrain.types import Label, Mode


class VllmScorer:
    """Scores prompts with a merged model folder. One step gives both labels' log-probabilities and the likeliest token of all.

    model: a folder or id that vLLM loads. options: of vllm.LLM, for example tensor_parallel_size. Raises ModelError without vLLM.
    """

    def __init__(
        self, model: str, tokenizer: Any, template: GuardTemplate, *, max_reason_tokens: int = 64, **options: Any
    ) -> None:
        self._vllm = _import_vllm()
        self._engine = self._vllm.LLM(model=model, enable_prefix_caching=True, **options)
        self.tokenizer = tokenizer
        self.template = template
        self.max_reason_tokens = max_reason_tokens

    def score(
        self, prompts: Sequence[Prompt], modes: Collection[Mode], *, escalates: Callable[[float], bool] | None = None
    ) -> Iterator[tuple[int, Scored]]:
        """Yield (index, Scored) for every prompt, as `Scorer.score`."""
        ids = [prompt_ids(self.template, prompt) for prompt in prompts]
        scored = [Scored({}, {}) for _ in prompts]
        on = list(range(len(prompts))) if Mode.ON in modes else []
        if Mode.OFF in modes:
            for index, (score, is_natural) in enumerate(self._verdicts(ids, self.template.off_verdict)):
                scored[index].scores[Mode.OFF], scored[index].is_natural[Mode.OFF] = score, is_natural
            on = [index for index in on if escalates is None or escalates(scored[index].scores[Mode.OFF])]
        reasoned = dict(zip(on, self._reason([ids[index] for index in on]), strict=True))
        for index, row in enumerate(scored):
            yield index, row.joined(reasoned.get(index))

    def _reason(self, ids: list[list[int]]) -> list[Scored]:
        if not ids:
            return []
        opened = [[*each, *self.template.opening_ids] for each in ids]
        parameters = self._vllm.SamplingParams(**reason_parameters(self.template, self.max_reason_tokens))
        reasons = [
            read_reason(output.token_ids, self.template, self.max_reason_tokens) for output in self._run(opened, parameters)
        ]
        written = [[*each, *reason.ids] for each, reason in zip(opened, reasons, strict=True)]
        return [
            Scored(
                {Mode.ON: score},
                {Mode.ON: is_natural and not reason.is_cut},
                self.tokenizer.decode(reason.ids).strip(),
                reason.is_cut,
            )
            for reason, (score, is_natural) in zip(reasons, self._verdicts(written, self.template.on_verdict), strict=True)
        ]

    def _verdicts(self, ids: list[list[int]], verdict: VerdictIds) -> list[tuple[float, bool]]:
        parameters = self._vllm.SamplingParams(**verdict_parameters(verdict))
        outputs = self._run([[*each, *verdict.prefix] for each in ids], parameters)
        return [read_verdict(output.token_ids[0], output.logprobs[0], verdict) for output in outputs]

    def _run(self, ids: list[list[int]], parameters: Any) -> list[Any]:
        prompts = [{"prompt_token_ids": each} for each in ids]
        return [done.outputs[0] for done in self._engine.generate(prompts, parameters, use_tqdm=False)]


def prompt_ids(template: GuardTemplate, prompt: Prompt) -> list[int]:
    """What the engine reads of a prompt: the policy first, which it caches."""
    return [*template.policy_ids, *template.prompt_segment(prompt).input_ids]


def label_ids(verdict: VerdictIds) -> tuple[int, int]:
    """The tokens whose logits are compared: malicious, benign."""
    return verdict.labels[Label.MALICIOUS][0], verdict.labels[Label.BENIGN][0]


def verdict_parameters(verdict: VerdictIds) -> dict[str, Any]:
    """Of vllm.SamplingParams: one greedy token, free so that it shows what is natural, and the log-probability of each label.

    Not `allowed_token_ids`: the token would always be a label. Not `logprobs`: a label may not be among the likeliest, and a
    number there would replace the count of `logprob_token_ids`.
    """
    return {
        "temperature": 0.0,
        "max_tokens": 1,
        "logprob_token_ids": list(label_ids(verdict)),
        "detokenize": False,
    }


def reason_parameters(template: GuardTemplate, max_tokens: int) -> dict[str, Any]:
    """Of vllm.SamplingParams: greedy, to a stop, to the text of the end, or to the cap and as many tokens as an end has."""
    end = template.reason_end()
    return {
        "temperature": 0.0,
        "max_tokens": max_tokens + len(end),
        "stop_token_ids": sorted(template.reason_stops()),
        "stop": [template.encoder.text(end)],
    }


def read_reason(token_ids: Sequence[int], template: GuardTemplate, max_tokens: int) -> Reason:
    """The reason in what the engine wrote, which may hold the stop or the end, cut where Scorer would have cut it."""
    reason = Reason.of(template, max_tokens)
    reason.take_all(token_ids)
    return reason


def read_verdict(token_id: int, logprobs: Mapping[int, Any], verdict: VerdictIds) -> tuple[float, bool]:
    """Score and naturalness. token_id: the likeliest of all; logprobs: by token id, with an attribute `logprob`.

    Raises ModelError where a label's log-probability is missing: no score is made up.
    """
    malicious, benign = label_ids(verdict)
    if missing := [label for label in (malicious, benign) if label not in logprobs]:
        raise ModelError("vLLM gave no log-probability of a label", where="vllm", found=f"token ids {missing} missing")
    return logprobs[malicious].logprob - logprobs[benign].logprob, token_id in {malicious, benign}


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ModelError("vLLM is not installed", where="vllm", hint="pip install guardtrain[vllm]") from error
    return vllm
