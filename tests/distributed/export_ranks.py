"""What each rank of test_exports_of_ranks.py does: engines of DeepSpeed train a step, save a checkpoint, and show their weights.

python -m torch.distributed.run --nproc_per_node 3 export_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(ACCELERATE_USE_DEEPSPEED="true", DS_ACCELERATOR="cpu")

import deepspeed
import torch
from memory import peak_growth_bytes
from safetensors.torch import save_file
from tiny_models import build_tiny

from guardtrain.config import ModelConfig
from guardtrain.distributed.checkpoint import seal
from guardtrain.distributed.engine import StepShape, read_file, resolve
from guardtrain.distributed.ranks import join, launched, leave
from guardtrain.model.adapters import prepare_for_training
from guardtrain.train.save import write_split_model

REPOSITORY = Path(__file__).parents[2]
VOCABULARY = 101
GIANT_SHARD_BYTES = 48_000_000


@dataclass(frozen=True)
class Case:
    """One engine. zero: what differs from the shipped file. Widths are odd, so that ZeRO has to pad everywhere."""

    name: str
    file: str
    dtype: str = "float32"
    tied: bool = True
    method: str = "full"
    zero: tuple[tuple[str, Any], ...] = ()
    is_giant: bool = False


CASES = [
    Case("zero1", "zero1"),
    Case("zero1-half", "zero1", dtype="bfloat16", tied=False),
    Case("zero1-freeze", "zero1", dtype="bfloat16", method="freeze"),
    Case("zero2-half", "zero2", dtype="bfloat16"),
    Case("zero2-untied", "zero2", tied=False),
    Case("zero2-freeze", "zero2", method="freeze", tied=False),
    Case("zero2-aligned", "zero2", zero=(("parameter_alignment", True), ("round_robin_gradients", True))),
    Case("zero3", "zero3"),
    Case("zero3-half", "zero3", dtype="bfloat16", tied=False),
    Case("zero3-freeze", "zero3", dtype="bfloat16", method="freeze"),
    Case("zero3-freeze-untied", "zero3", method="freeze", tied=False),
    Case("zero3-groups", "zero3", zero=(("sub_group_size", 500),)),
    Case("zero2-offload", "zero2_offload", dtype="bfloat16", tied=False),
    Case("zero3-offload", "zero3_offload", dtype="bfloat16", tied=False),
    Case("zero3-giant", "zero3", tied=False, is_giant=True),
]


def build(case: Case) -> Any:
    if not case.is_giant:
        model = build_tiny("qwen3", vocab_size=VOCABULARY, hidden_size=33, tied=case.tied)
        return prepare_for_training(model, ModelConfig(method=case.method, trained_layers=1), getattr(torch, case.dtype))
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 11}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False))


def train_a_step(case: Case) -> Any:
    torch.manual_seed(5)
    model = build(case).to(getattr(torch, case.dtype))
    ranks = launched().size
    shape = StepShape(packs_per_step=ranks, world_size=ranks, max_grad_norm=1.0, dtype=case.dtype)
    settings = resolve(read_file(REPOSITORY / "ds_configs" / f"{case.file}.json"), shape, where=case.file)
    settings["zero_optimization"] |= dict(case.zero)
    settings["zero_force_ds_cpu_optimizer"] = False  # the files are the same with any optimizer, and theirs would be compiled
    trained = [value for value in model.parameters() if value.requires_grad]
    groups = [{"params": [value for value in trained if (value.dim() > 1) == is_matrix]} for is_matrix in (True, False)]
    # SGD has no moments, which would only fill the disk.
    optimizer = torch.optim.SGD(groups, lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    input_ids = torch.arange(8).add(launched().index)[None]
    engine.backward(engine(input_ids=input_ids, labels=input_ids).loss)
    engine.step()
    return engine


def save(engine: Any, case: Case, folder: Path) -> None:
    """A checkpoint as the trainer's; the engine's weights as they are, and the end of a run where ZeRO-3 has split them."""
    checkpoints, stage = folder / "checkpoints", engine.zero_optimization_stage()
    checkpoints.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(checkpoints / "tmp-checkpoint"), tag="global_step1")
    seal(checkpoints / "tmp-checkpoint", checkpoints, step=1, world_size=launched().size, zero_stage=stage, cursor={})
    model = engine.module
    if stage == 3:
        most = GIANT_SHARD_BYTES if case.is_giant else 5_000
        growth = peak_growth_bytes(lambda: write_split_model(model, folder / "split", most))
        if launched().is_main:
            (folder / "growth.json").write_text(json.dumps(growth))
    if launched().is_main:
        model.config.save_pretrained(folder)
    if not case.is_giant:
        save_reference(model, folder)


def save_reference(model: Any, folder: Path) -> None:
    whole = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
            whole[name] = value.detach().clone()
    if launched().is_main:
        save_file(whole, folder / "reference.safetensors")


def main(root: Path) -> None:
    join(timeout_seconds=120)
    for case in CASES:
        engine = train_a_step(case)
        save(engine, case, root / case.name)
        engine.destroy()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
