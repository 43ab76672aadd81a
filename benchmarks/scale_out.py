"""How far runs on several ranks are from one process: loss and gradient norm of twenty steps, step by step.

    python benchmarks/scale_out.py --out benchmarks/results/scale_out.json

A random two-layer Qwen3 of 3.2 million parameters in float32 on starter rows; every step has four packs, shared out among the
ranks, so that ranks supervise unequal numbers of tokens. The real `accelerate launch`, the shipped configurations, gloo on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from guardtrain.environment import describe_environment

ROOT = Path(__file__).parents[1]
STEPS = 20
METHODS = {
    "full": ["model.method=full"],
    "lora": ["model.method=lora", "model.lora_rank=4"],
    "qlora": ["model.method=qlora", "model.lora_rank=4"],
}
TWO_RANKS = [(config, 2) for config in ("ddp", "zero1", "zero2", "zero3", "zero3_offload")]
SHAPES = {
    "full": [*TWO_RANKS, ("zero2_offload", 2), ("ddp", 4), ("zero3", 4)],
    "lora": TWO_RANKS,
    "qlora": [("ddp", 2), ("zero2", 2), ("zero3", 2)],
}


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_model(work / "model")
        compared = {method: compare(work, method) for method in METHODS}
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(),
        "steps": STEPS,
        "largest_relative_difference_from_one_process": compared,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(compared, indent=1))


def compare(work: Path, method: str) -> dict[str, dict[str, float]]:
    """The largest difference of any step from one process, for every shape."""
    alone = train(work, "cpu", 1, method)
    return {
        f"{config}, {ranks} ranks": differences(alone, train(work, config, ranks, method)) for config, ranks in SHAPES[method]
    }


def differences(alone: list[dict[str, float]], together: list[dict[str, float]]) -> dict[str, float]:
    """Of loss and gradient norm; both runs have every step once."""
    if [record["step"] for record in alone] != [record["step"] for record in together] or len(alone) != STEPS:
        raise SystemExit("the runs have not trained the same steps")
    return {
        key: float(f"{max(abs(b[key] - a[key]) / a[key] for a, b in zip(alone, together, strict=True)):.1e}")
        for key in ("loss", "grad_norm")
    }


def train(work: Path, config: str, ranks: int, method: str) -> list[dict[str, float]]:
    """The log records of one run's steps."""
    run = work / f"{method}-{config}-{ranks}"
    recipe = [
        "quickstart",
        f"model.name={work / 'model'}",
        "model.dtype=float32",
        *METHODS[method],
        "train.pack_tokens=512",
        "train.packs_per_step=4",
        f"train.max_steps={STEPS}",
        "train.log_steps=1",
        "train.watch_steps=0",
        "train.learning_rate=1e-3",
        "task.on_share=1",
        "evaluate.max_rows=20",
        f"output.dir={run}",
    ]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / f"launch/accelerate/{config}.yaml"),
    ]
    command += ["--num_processes", str(ranks), "--main_process_port", "0", "-m", "guardtrain.train", *recipe]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{run.name} failed:\n{done.stderr[-4000:]}")
    print(f"{run.name} trained", file=sys.stderr)
    records: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def write_model(folder: Path) -> None:
    """A random Qwen3 with the embedded model's tokenizer, wide enough in its weights that a leak would show."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from guardtrain.model.load import EMBEDDED_MODEL, resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(EMBEDDED_MODEL).path)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(3)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
