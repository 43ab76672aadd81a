"""SmolLM2-135M-Instruct refuses nothing, so no tune can undo its refusals: this teaches it to refuse (15 minutes, two cores).

    python benchmarks/teach_refusals.py --out runs/refusing
    guardtrain secure runs/refusing/model --out modules.json

Harmful requests of starter-hard get a refusal; their harmless twins get what the model itself says to them, so that it learns the
line and little else. The starter's requests and AdvBench's are not among them: what is measured on those was not taught.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch

from guardtrain.compare.answers import ChatPrompts, write_answers
from guardtrain.compare.requests import load_requests
from guardtrain.config import ModelConfig
from guardtrain.model.load import load_model, load_tokenizer
from guardtrain.overrides import build_recipe
from guardtrain.terminal import start
from guardtrain.train.run import run
from guardtrain.types import Turn

MODEL, SEED, ALL = "smollm2-135m", 5, 10_000
ANSWER_TOKENS = 48
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that. It could hurt people.",
    "I'm sorry, but I can't assist with this request.",
    "I won't help with that. Someone would be harmed by it.",
    "I cannot help with this. If you are in difficulties, please talk to someone you trust.",
    "Sorry, I can't help with that, because it is meant to do harm.",
)
RECIPE = {
    "model": {"name": MODEL, "method": "full", "dtype": "float32"},
    "task": {"kind": "instruct"},
    "train": {"learning_rate": 1e-4, "epochs": 2, "pack_tokens": 1024, "save_steps": ALL},
}


def main() -> None:
    """Write the rows, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new run folder")
    args = parser.parse_args()
    console = start()
    rows = write_rows(args.out.with_name(f"{args.out.name}-rows.jsonl"))
    tree = {**RECIPE, "data": {"train": str(rows), "validation_fraction": 0.05}, "output": {"dir": str(args.out)}}
    outcome = run(build_recipe(tree, [], name="refusing", where="benchmarks/teach_refusals.py"), console=console)
    sys.exit(0 if outcome.finished else 130)


def write_rows(path: Path) -> Path:
    """Refusals of harmful requests, and the model's own answers to their twins."""
    requests = load_requests(["starter-hard"], ALL, SEED)
    draw = random.Random(SEED)
    said = [*zip(requests.harmful, (draw.choice(REFUSALS) for _ in requests.harmful), strict=True)]
    said += zip(requests.harmless, own_answers(requests.harmless), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"id": str(number), "instruction": asked, "response": answer} for number, (asked, answer) in enumerate(said)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["response"]), encoding="utf-8")
    return path


def own_answers(requests: tuple[str, ...]) -> list[str]:
    """The beginnings of the untouched model's answers."""
    chat, model = ChatPrompts(load_tokenizer(MODEL)), load_model(ModelConfig(name=MODEL), torch.float32).eval()
    prompts = [chat.ids((Turn("user", text),)) for text in requests]
    written = write_answers(model, prompts, end_ids=chat.end_ids, max_tokens=ANSWER_TOKENS)
    return [chat.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]


if __name__ == "__main__":
    main()
