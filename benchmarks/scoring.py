"""Rows a second of the guard's modes, in batches over one cached policy, against a loop of `model.generate` one row at a time.

    python benchmarks/scoring.py --model RUN --data FILE --rows 200 --out benchmarks/results/scoring.json

Same model, dtype, policy, rows and opening of the think block; both have a key/value cache. The peer writes 100 tokens, or as
many as it takes to end its turn, and its verdict is parsed from its text. A row agrees where that is the sign of the guard's
score in mode `on`. Speed-ups are given by wall clock, and by processor time, which tells more on a machine that is shared.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from guardtrain.config import Source
from guardtrain.data.sources import load_sources
from guardtrain.data.splits import balanced_subset
from guardtrain.environment import describe_environment
from guardtrain.evaluate.calibration import calibrate_on_rows
from guardtrain.evaluate.cascade import choose_cascade
from guardtrain.evaluate.files import PACK_TOKENS
from guardtrain.evaluate.runner import Evaluation, evaluate
from guardtrain.evaluate.speed import measure_latency
from guardtrain.inference.guards import LoadedGuard, load_guard
from guardtrain.inference.parser import parse_answer
from guardtrain.types import GuardExample, Label, Mode

NEW_TOKENS = 100
TARGET_FPR = 0.05  # of the cascade's band, where the guard has none: chosen on the same rows, for speed alone
LATENCY_ROWS = 20


def main() -> None:
    """Time ours, time the peer, compare verdicts, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    guard = load_guard(args.model)
    examples = rows_of(args.data, args.rows, guard)
    evaluation, ours = time_ours(guard, examples)
    peers, verdicts = time_peers(guard, examples)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {**describe_environment(), "torch_threads": torch.get_num_threads()},
        "model": args.model,
        "dtype": str(next(guard.model.parameters()).dtype),
        "rows": len(examples),
        "policy_tokens": len(guard.template.policy_ids),
        "prompt_tokens": sum(guard.scorer().lengths([example.prompt for example in examples])),
        "escalation_rate": evaluation.escalation_rate,
        "ours": ours,
        "peers": peers,
        "speedup": {mode: {peer: speedup(ours[mode], peers[peer]) for peer in peers} for mode in ours},
        "latency": latency(guard, examples, evaluation),
        "verdicts": dict(Counter(agreement(evaluation, verdicts))),
        "truncated_reasons": sum(row.truncated for row in evaluation.scored),
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: results[key] for key in ("ours", "peers", "speedup", "latency", "verdicts")}, indent=1))


def rows_of(data: str, number: int, guard: LoadedGuard) -> list[GuardExample]:
    """A seeded, balanced subset of the rows that the guard admits."""
    examples = [row for row in load_sources([Source(path=data)], "guard").examples if isinstance(row, GuardExample)]
    limit = guard.settings.max_prompt_tokens
    return balanced_subset([row for row in examples if guard.template.count_prompt_tokens(row.prompt) <= limit], number, seed=0)


def timed(action: Callable[[], Any], rows: int) -> tuple[Any, dict[str, float]]:
    """What `action` gives, and how long it took."""
    wall, processor = time.perf_counter(), time.process_time()
    result = action()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return result, {"seconds": wall, "processor_seconds": processor, "rows_per_second": rows / wall}


def time_ours(guard: LoadedGuard, examples: Sequence[GuardExample]) -> tuple[Evaluation, dict[str, dict[str, float]]]:
    """Each mode by itself. The evaluation holds every mode of every row."""
    scorer = guard.scorer(pack_tokens=PACK_TOKENS)
    prompts = [example.prompt for example in examples]
    list(scorer.score(prompts[:1], list(Mode)))
    evaluation, both = timed(lambda: evaluate(scorer, examples, ["off", "on", "both"]), len(examples))
    scores = {mode: evaluation.scores(mode) for mode in ("off", "both")}
    thresholds = calibrate_on_rows(scores, evaluation.examples, TARGET_FPR, []).thresholds
    off_N, both_N = evaluation.scores("off"), evaluation.scores("both")
    cascade = choose_cascade(off_N, both_N, evaluation.is_malicious_N, thresholds, target_fpr=TARGET_FPR)
    figures = {"both": both}
    for mode in Mode:
        _, figures[mode.value] = timed(lambda mode=mode: list(scorer.score(prompts, [mode])), len(examples))
    _, figures["cascade"] = timed(lambda: list(scorer.score(prompts, list(Mode), escalates=cascade.escalates)), len(examples))
    return evaluate(
        Stored(evaluation), examples, ["off", "on", "both", "cascade"], thresholds=thresholds, cascade=cascade
    ), figures


class Stored:
    """Gives what was scored already."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation

    def score(self, prompts: Any, modes: Any, *, escalates: Any = None) -> Any:
        """By index."""
        return enumerate(self.evaluation.scored)


def time_peers(guard: LoadedGuard, examples: Sequence[GuardExample]) -> tuple[dict[str, dict[str, float]], list[Label | None]]:
    """The loop, to the end of the turn and to exactly 100 tokens; the verdicts of the first, None where none can be read."""
    template = guard.template
    ids = [[*template.policy_ids, *template.prompt_segment(row.prompt).input_ids, *template.opening_ids] for row in examples]
    generate(guard, ids[0], stops=True)
    written, to_the_end = timed(lambda: [generate(guard, each, stops=True) for each in ids], len(ids))
    all_tokens, exactly = timed(lambda: [generate(guard, each, stops=False) for each in ids], len(ids))
    assert all(len(tokens) == NEW_TOKENS for tokens in all_tokens)
    to_the_end["tokens_per_row"] = sum(map(len, written)) / len(ids)
    exactly["tokens_per_row"] = NEW_TOKENS
    opening = template.encoder.text(template.opening_ids)
    answers = [
        parse_answer(opening + template.encoder.text([t for t in tokens if t not in template.end_ids])) for tokens in written
    ]
    return {"to_end_of_turn": to_the_end, "100_tokens": exactly}, [answer.verdict for answer in answers]


def generate(guard: LoadedGuard, ids: list[int], *, stops: bool) -> list[int]:
    """Greedy, one row, cached."""
    end = guard.template.end_ids
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, eos_token_id=end if stops else None, pad_token_id=end[0]
    )
    prompt = torch.tensor([ids], device=guard.model.device)
    guard.model.generation_config.eos_token_id = config.eos_token_id  # it would fill in what the call leaves out
    with torch.inference_mode():
        output = guard.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


def speedup(ours: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """How many times as many rows."""
    return {clock: round(peer[clock] / ours[clock], 2) for clock in ("seconds", "processor_seconds")}


def latency(guard: LoadedGuard, examples: Sequence[GuardExample], evaluation: Evaluation) -> dict[str, Any]:
    """One prompt at a time."""
    prompts = [example.prompt for example in examples]
    modes = list(evaluation.measures)
    found = measure_latency(guard.scorer(), prompts, modes, rows=LATENCY_ROWS, cascade=evaluation.cascade)
    return {mode: asdict(each) for mode, each in found.items()}


def agreement(evaluation: Evaluation, verdicts: Sequence[Label | None]) -> list[str]:
    """Of each row: whether the peer's verdict is ours, and whether it had one."""
    own = [Label.MALICIOUS if score >= 0 else Label.BENIGN for score in evaluation.scores("on")]
    return [
        "peer has none" if theirs is None else "same" if theirs is ours else "other"
        for ours, theirs in zip(own, verdicts, strict=True)
    ]


if __name__ == "__main__":
    main()
