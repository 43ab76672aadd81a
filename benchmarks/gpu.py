"""Everything that is measured on one GPU, in one run: speed beside peers, utilisation, a long run, memory, where time goes.

    python benchmarks/gpu.py --shared ../shared --out benchmarks/results/gpu.json

The model has the geometry of Qwen3-0.6B, random weights and Qwen3's real tokenizer: speed does not depend on what is in the
weights. The planner is held against Llama 3.1's geometries besides, with Llama 3's tokenizer (tests/fetch_tokenizers.sh). A part
that fails is recorded with its error, and the others go on. `--tiny` is a rehearsal without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from giants import random_model, write_giant
from rich.console import Console
from step_time import real_rows, write_guards

from guardtrain.bench.step import StepOptions, bench_step, results_table
from guardtrain.bench.work import policy_of_length
from guardtrain.config import DataConfig, Recipe
from guardtrain.environment import describe_environment
from guardtrain.model.load import cache_dir, load_tokenizer
from guardtrain.model.loss import loss_kernel
from guardtrain.overrides import build_recipe, dump_recipe
from guardtrain.train.job import build_job
from guardtrain.train.trainer import PackTrainer

QWEN3_06B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TINY = {**QWEN3_06B, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 16}

# Dense bfloat16 products, operations a second, from NVIDIA's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
POLICY_TOKENS = 200
ROOT = Path(__file__).parents[1]
LLAMA_TOKENIZER = Path(os.environ.get("GUARDTRAIN_LLAMA3_TOKENIZER") or cache_dir() / "tokenizers" / "llama3")
# Name, shipped geometry, layers of it or all, method, tokens of a pack, gradient checkpointing.
GIANTS = [
    ("8B", "llama-3.1-8b", None, "qlora", 1024, True),
    ("8B", "llama-3.1-8b", None, "qlora", 2048, True),
    ("8B", "llama-3.1-8b", None, "qlora", 4096, False),
    ("8B", "llama-3.1-8b", None, "lora", 4096, True),
    ("8B", "llama-3.1-8b", None, "lora", 8192, True),
    ("70B", "llama-3.1-70b", None, "qlora", 1024, True),
    ("70B", "llama-3.1-70b", None, "qlora", 4096, True),
    ("one layer of 405B", "llama-3.1-405b", 1, "lora", 4096, False),
    ("two layers of 405B", "llama-3.1-405b", 2, "lora", 4096, False),
]
# TRL is judged by the best of these.
PEERS: dict[str, dict[str, Any]] = {
    "peers by sdpa": {},
    "peers by sdpa and Liger": {"peer_liger": True, "contenders": ("trl-padded", "trl-packed", "trainer")},
    "peers by flex_attention and Liger": {"peer_attention": "flex_attention", "peer_liger": True, "contenders": ("trl-packed",)},
}


def main() -> None:
    """Run the parts one after the other; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of the real data and tokenizers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", help="beginnings of their names, separated by semicolons; all of them if not given")
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny model and few rows")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # this process is that part's
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.work, args.tiny)))
        return
    names = [name for name in PARTS if not args.parts or name.startswith(tuple(args.parts.split(";")))]
    if not names:
        parser.error(f"no such parts, expected beginnings of {list(PARTS)}")
    results = {"command": shlex.join(["python", *sys.argv]), "environment": describe_environment(), "parts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_guards(real_rows(args.shared / "data"), work)
        make_model(work / "model", args.shared / "tokenizers" / "qwen3", TINY if args.tiny else QWEN3_06B)
        policy = policy_of_length(load_tokenizer(str(work / "model")), Recipe().task.policy, POLICY_TOKENS)
        (work / "policy.txt").write_text(policy)
        for name in names:
            results["parts"][name] = in_process(name, work, args.tiny)
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def make_model(folder: Path, tokenizer: Path, geometry: dict[str, Any]) -> None:
    """A Qwen3 of this geometry with random weights, saved as anyone's model is."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**geometry)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def in_process(name: str, work: Path, is_tiny: bool) -> dict[str, Any]:
    """One part's figures from a process of its own, so that its peak memory is its own; or its error."""
    command = [sys.executable, __file__, "--out", "-", "--work", str(work), "--part", name, *(["--tiny"] if is_tiny else [])]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr[-4000:])
    figures = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-2000:]}
    print(f"{name}: {time.perf_counter() - start:.0f} s", {k: v for k, v in figures.items() if k != "profile"}, file=sys.stderr)
    return {**figures, "seconds_of_the_part": round(time.perf_counter() - start, 1)}


# --- parts


def step_time(work: Path, is_tiny: bool, method: str, peers: dict[str, Any]) -> dict[str, Any]:
    """Both modes behind a policy of 200 tokens, beside TRL padded and packed and the plain Trainer; `peers`: their settings."""
    options = StepOptions(
        **({} if is_tiny else peers),
        rows=16 if is_tiny else 256,
        steps=4,
        min_seconds=0 if is_tiny else 10,
        policy_tokens=POLICY_TOKENS,
        batch_sizes=(4,) if is_tiny else (16, 64),
        peer_pack_tokens=1024 if is_tiny else 8192,
    )
    results = bench_step(recipe(work, method, pack_tokens=1024 if is_tiny else 16_384), options, console=Console(stderr=True))
    Console(stderr=True).print(results_table(results))
    return results


def utilisation(work: Path, is_tiny: bool, attention: str, pack_tokens: int) -> dict[str, Any]:
    """Model FLOPs utilisation of full tuning with one backend and pack size."""
    if is_tiny:
        attention, pack_tokens = "sdpa", 1024
    return measured(trainer_of(recipe(work, "full", pack_tokens=pack_tokens, attention=attention, max_steps=12)))


def long_run(work: Path, is_tiny: bool) -> dict[str, Any]:
    """Seconds of training for 8,000 rows in both modes, three epochs: the real rows, repeated until there are as many."""
    num_rows, epochs = (200, 1) if is_tiny else (8000, 3)
    reasoned = sum(1 for _ in (work / "guards.jsonl").open())
    weight = num_rows / (reasoned * (1 - DataConfig().validation_fraction))
    trainer = trainer_of(recipe(work, "full", pack_tokens=1024 if is_tiny else 16_384, weight=weight, epochs=epochs))
    rows_seen = sum(map(len, trainer.train_dataset.packs))
    return {"rows_of_an_epoch": rows_seen / epochs, "epochs": epochs, **measured(trainer)}


def qlora_memory(work: Path, is_tiny: bool, checkpointing: bool) -> dict[str, Any]:
    """Peak memory of QLoRA at a pack of 4,096 tokens, with gradient checkpointing, as in the shipped recipe, or without."""
    values = {"pack_tokens": 4096, "gradient_checkpointing": checkpointing, "max_steps": 3}
    return measured(trainer_of(recipe(work, "qlora", **values)))


def forward_and_backward(work: Path, is_tiny: bool) -> dict[str, Any]:
    """The operations that one pack's forward and backward of full tuning spend most of their time in."""
    from torch.profiler import ProfilerActivity, profile

    trainer = trainer_of(recipe(work, "full", pack_tokens=1024 if is_tiny else 16_384, max_steps=6))
    trainer.train()
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *device]) as seen:
        trainer.training_step(trainer.model, inputs)
        synchronize()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return {"profile": seen.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60).splitlines()}


def sharing(work: Path, is_tiny: bool, config: str) -> dict[str, Any]:
    """A whole run on one GPU as people start it: `accelerate launch`, training, a checkpoint, the guard saved and measured."""
    wanted = recipe(work, "full", pack_tokens=1024 if is_tiny else 8192, max_steps=6 if is_tiny else 20, epochs=3, log_steps=1)
    if is_tiny:
        wanted = dataclasses.replace(wanted, model=dataclasses.replace(wanted.model, dtype="float32"))
    wanted = dataclasses.replace(wanted, evaluate=dataclasses.replace(wanted.evaluate, max_rows=50, modes=("off",)))
    file = work / f"{config}.yaml"
    file.write_text(dump_recipe(wanted))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/launch/accelerate/{config}.yaml"]
    command += ["--num_processes", "1", "--main_process_port", "0", "-m", "guardtrain.train", str(file)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    run = Path(wanted.run_dir)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["tokens_per_second"] for record in records if "loss" in record]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "tokens_per_second": statistics.median(rates[len(rates) // 3 :]),
        **{key: summary[key] for key in ("steps", "train_seconds", "final_loss", "peak_gpu_gib") if key in summary},
        "checkpoint_gib": round(sum(f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.is_file()) / 2**30, 2),
    }


def planning(
    work: Path, is_tiny: bool, method: str, pack_tokens: int, checkpointing: bool, model: str = "model"
) -> dict[str, Any]:
    """Peak memory and speed beside what `guardtrain plan` says of the same recipe on this device."""
    from guardtrain.plan.geometry import read_geometry
    from guardtrain.plan.hardware import DEVICES, parse_cluster
    from guardtrain.plan.search import as_asked
    from guardtrain.plan.workload import workload_of

    values = {"pack_tokens": 1024 if is_tiny else pack_tokens, "gradient_checkpointing": checkpointing, "max_steps": 9}
    wanted = recipe(work, method, model=model, **values)
    figures = measured(trainer_of(wanted))
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    known = next((name for name in DEVICES if name.partition("-")[0] in here.lower()), "cpu")
    planned = as_asked(wanted, read_geometry(wanted.model.name), workload_of(wanted), parse_cluster(known))
    return {
        **figures,
        "device_of_the_plan": planned.cluster.device.name,
        "predicted_mib": round(planned.peak.total / 2**20),
        "predicted_tokens_per_second": round(planned.tokens_per_step / planned.time.total, 1),
        "predicted_peak": {"moment": planned.peak.name, **{kind: round(size) for kind, size in planned.peak.parts.items()}},
        "predicted_terms": planned.time.terms,
    }


def planning_giant(
    work: Path, is_tiny: bool, geometry: str, layers: int | None, method: str, pack_tokens: int, checkpointing: bool
) -> dict[str, Any]:
    """`planning` for a shipped geometry, or so many layers of it: what two take more than one is a layer's."""
    folder = work / f"{geometry}-{layers or 'all'}"
    if not folder.exists():
        write_giant(folder, geometry, LLAMA_TOKENIZER, layers=layers, is_tiny=is_tiny)
    with unittest.mock.patch("guardtrain.train.loading.load_model", random_model):
        return planning(work, is_tiny, method, pack_tokens, checkpointing, model=folder.name)


# Each runs in a process of its own: nothing of one part's memory or compiled kernels is in another's figures.
PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "qlora memory, checkpointing": functools.partial(qlora_memory, checkpointing=True),
    "qlora memory, all activations kept": functools.partial(qlora_memory, checkpointing=False),
    **{
        f"utilisation, {attention}, {pack_tokens}": functools.partial(utilisation, attention=attention, pack_tokens=pack_tokens)
        for attention in ("flex", "flash", "sdpa")
        for pack_tokens in (8192, 16_384, 32_768)
    },
    "long run": long_run,
    **{
        f"step time, {method}, {name}": functools.partial(step_time, method=method, peers=peers)
        for method in ("full", "qlora")
        for name, peers in PEERS.items()
    },
    "forward and backward": forward_and_backward,
    **{
        f"planning, {method}, {pack_tokens}{', checkpointing' * checkpointing}": functools.partial(
            planning, method=method, pack_tokens=pack_tokens, checkpointing=checkpointing
        )
        for method, pack_tokens, checkpointing in (
            ("qlora", 1024, True),
            ("qlora", 4096, False),
            ("lora", 4096, True),
            ("lora", 8192, False),
            ("full", 4096, True),
            ("full", 8192, False),
            ("full", 16_384, False),
            ("freeze", 8192, False),
        )
    },
    **{
        f"planning, {name}, {method}, {pack_tokens}{', checkpointing' * checkpointing}": functools.partial(
            planning_giant, geometry=geometry, layers=layers, method=method, pack_tokens=pack_tokens, checkpointing=checkpointing
        )
        for name, geometry, layers, method, pack_tokens, checkpointing in GIANTS
    },
    **{
        f"sharing, {config}": functools.partial(sharing, config=config)
        for config in ("single_gpu", "zero2", "zero3", "zero2_offload", "zero3_offload")
    },
}


# --- what the parts share


def recipe(
    work: Path, method: str, *, model: str = "model", attention: str = "auto", weight: float = 1.0, **train: Any
) -> Recipe:
    """Both modes of every real row, every reason trained; nothing saved or watched on the way."""
    tree = {
        "model": {"name": str(work / model), "method": method, "attention": attention, "dtype": "bfloat16"},
        "task": {"modes": ["off", "on"], "on_share": 1.0, "policy": (work / "policy.txt").read_text()},
        "data": {"train": [{"path": str(work / "guards.jsonl"), "weight": weight}], "max_prompt_tokens": 4096},
        "train": {"watch_steps": 0, "log_steps": 1000, "save_steps": 1_000_000, **train},
        "output": {"dir": tempfile.mkdtemp(dir=work)},
    }
    return build_recipe(tree, [], name="gpu", where="gpu")


def trainer_of(wanted: Recipe) -> PackTrainer:
    """The trainer that `guardtrain train` would use, without checkpoints; says what was chosen."""
    job = build_job(wanted)
    print(*job.choices, sep="\n", file=sys.stderr)
    arguments = dataclasses.replace(job.arguments, save_strategy="no")
    return PackTrainer(model=job.model, args=arguments, train_dataset=job.stream, data_collator=job.collator, keep_checkpoints=2)


def measured(trainer: PackTrainer) -> dict[str, Any]:
    """Train; speed after the first third of the steps, where kernels are compiled, and the peak of the device's memory."""
    from transformers import TrainerCallback

    times: list[tuple[float, int]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """When each step ended, and how many tokens had been computed."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize()
            times.append((time.perf_counter(), trainer.computed_tokens))

    trainer.add_callback(Clock())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    (then, tokens_then), (now, tokens_now) = times[len(times) // 3], times[-1]
    rate = (tokens_now - tokens_then) / (now - then)
    return {
        "steps": len(times),
        "seconds": round(seconds, 2),
        "computed_tokens": trainer.computed_tokens,
        "tokens_per_second": round(rate, 1),
        "peak_mib": torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else None,
        "loss": loss_kernel(trainer.model.get_output_embeddings()),
        "model_flops_utilisation": model_flops_utilisation(trainer, rate),
    }


def model_flops_utilisation(trainer: PackTrainer, tokens_per_second: float) -> float | None:
    """Operations of the model's own mathematics, forward and backward, over what the GPU could do.

    None on an unknown GPU, and where not all weights train.

    Counted: 6 for each weight of a layer and token, 6 for each weight of the head and supervised token, 12 for each pair of
    tokens that see each other and each dimension of a head. Recomputing and masked-out scores do not count (as in PaLM,
    https://arxiv.org/abs/2204.02311, appendix B).
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for gpu, value in PEAK_FLOPS.items() if gpu in name), None)
    if peak is None or not all(parameter.requires_grad for parameter in trainer.model.parameters()):
        return None
    config, packs = trainer.model.config, [trainer.train_dataset[index] for index in range(min(8, len(trainer.train_dataset)))]
    tokens = sum(len(pack) for pack in packs)
    supervised = sum(len(pack.targets_N) for pack in packs)
    # A token sees its path: as many tokens as its position, and itself.
    pairs = sum(int(pack.position_ids_T.sum()) + len(pack) for pack in packs)
    head = config.vocab_size * config.hidden_size
    in_layers = sum(p.numel() for n, p in trainer.model.named_parameters() if "layers." in n)
    dimensions = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    operations = 6 * in_layers * tokens + 6 * head * supervised + 12 * dimensions * pairs
    return round(operations / tokens * tokens_per_second / peak, 4)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
