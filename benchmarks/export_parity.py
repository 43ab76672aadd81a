"""A guard as GGUF files against the guard itself: the same prompts, through transformers and through the real llama.cpp.

    python benchmarks/export_parity.py --run RUN --out benchmarks/results/export_parity.json

The prompts are near-identical twins (starter-hard), hard to decide alike. A decision is the side of the threshold
in guard.json. llama.cpp runs with a cache of keys and values in 32 bits, so that the file alone makes the difference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the server and the memory gauge of the tests
from llama_cpp import llama_server
from memory import peak_growth_bytes

from guardtrain.config import Source
from guardtrain.data.sources import load_sources
from guardtrain.data.splits import balanced_subset
from guardtrain.environment import describe_environment
from guardtrain.inference.guards import LoadedGuard, load_guard
from guardtrain.inference.scorer import Prompt, Scored
from guardtrain.train.export import Export, ExportOptions, export_run
from guardtrain.types import Label, Mode

FORMATS = ("float32", "float16", "bfloat16", "q8_0")
CONTEXT = 4096


def main() -> None:
    """Score, export, score again, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--modes", default="off,on")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    modes = [Mode(name) for name in args.modes.split(",")]
    prompts = [
        example.prompt
        for example in balanced_subset(load_sources([Source(path="starter-hard")], "guard").examples, args.rows, seed=17)
    ]
    original = load_guard(str(args.run), device="cpu")
    expected, seconds = scored_by(original, prompts, modes)
    thresholds = original.settings.thresholds
    results: dict[str, Any] = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "environment": {**describe_environment(), "xllamacpp": importlib.metadata.version("xllamacpp")},
        "prompts": len(prompts),
        "thresholds": thresholds,
        "flagged": {mode.value: int((numbers(expected, mode) >= thresholds[mode]).sum()) for mode in modes},
        "seconds": seconds,
        "formats": {},
    }
    for dtype in FORMATS:
        results["formats"][dtype] = measure(args.run, dtype, original, prompts, expected, modes)
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def scored_by(guard: LoadedGuard, prompts: Sequence[Prompt], modes: Sequence[Mode]) -> tuple[list[Scored], float]:
    """In these modes, and how long it took."""
    start = time.perf_counter()
    scored = [each for _, each in sorted(guard.scorer().score(prompts, modes), key=itemgetter(0))]
    return scored, round(time.perf_counter() - start, 1)


def measure(
    run: Path, dtype: str, guard: LoadedGuard, prompts: Sequence[Prompt], expected: Sequence[Scored], modes: Sequence[Mode]
) -> dict[str, Any]:
    """One format."""
    with tempfile.TemporaryDirectory() as work:
        options = ExportOptions(to="gguf", dtype=dtype, out=Path(work) / dtype, shard_bytes=10**12)
        done: list[Export] = []
        growth = peak_growth_bytes(lambda: done.append(export_run(run, options, Console(stderr=True))))
        scored, seconds = scored_by(load_guard(str(options.out), device="cpu"), prompts, modes)
        in_llama_cpp = llama_cpp_scores(done[0].out / "model.gguf", guard, prompts)
    thresholds = guard.settings.thresholds
    return {
        "bytes": sum(file.num_bytes for file in done[0].files.values()),
        "export_seconds": round(done[0].seconds, 1),
        "export_memory_growth_bytes": growth,
        "transformers": {
            mode.value: difference(numbers(expected, mode), numbers(scored, mode), thresholds[mode]) for mode in modes
        },
        "same_reasons": sum(one.reason == other.reason for one, other in zip(expected, scored, strict=True)),
        "seconds": seconds,
        "llama.cpp": {"off": difference(numbers(expected, Mode.OFF), in_llama_cpp, thresholds["off"])},
    }


def llama_cpp_scores(model: Path, guard: LoadedGuard, prompts: Sequence[Prompt]) -> np.ndarray:
    """Mode off, from token ids."""
    template = guard.template
    malicious, benign = (template.off_verdict.labels[label][0] for label in Label)
    with llama_server(model, context=CONTEXT) as server:
        return np.array(
            [
                server.score(
                    [*template.policy_ids, *template.prompt_segment(prompt).input_ids, *template.off_verdict.prefix],
                    malicious,
                    benign,
                )
                for prompt in prompts
            ]
        )


def numbers(scored: Sequence[Scored], mode: Mode) -> np.ndarray:
    """The scores of one mode."""
    return np.array([each.scores[mode] for each in scored])


def difference(expected_N: np.ndarray, found_N: np.ndarray, threshold: float) -> Mapping[str, float]:
    """How far scores lie apart, and how many decisions are the same."""
    apart_N = np.abs(expected_N - found_N)
    same = int(((expected_N >= threshold) == (found_N >= threshold)).sum())
    return {"same_decisions": same, "most_apart": round(float(apart_N.max()), 6), "mean_apart": round(float(apart_N.mean()), 6)}


if __name__ == "__main__":
    main()
