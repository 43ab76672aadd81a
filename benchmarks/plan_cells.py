"""How far the planner is from what happens: peak memory by tensor counts, and step time, of real runs on CPUs.

    python benchmarks/plan_cells.py --out benchmarks/results/plan_cpu.json

Every cell is a real `accelerate launch` of a recipe on starter rows. Memory: bytes of all tensors of the rank that needs most,
through loading, the engine's start and four steps. Time: the median of the twelve later ones, which run uncounted. Predicted by
`guardtrain plan`'s own functions from the recipe, the model's config.json and this machine's figures, which `guardtrain bench
device RECIPE` measures first with as many ranks and threads; nothing of the cell's own run enters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from guardtrain.environment import describe_environment
from guardtrain.overrides import load_recipe
from guardtrain.plan.geometry import Geometry, read_geometry
from guardtrain.plan.hardware import Cluster, Device, read_device
from guardtrain.plan.search import Candidate, as_asked, assess
from guardtrain.plan.workload import workload_of

ROOT = Path(__file__).parents[1]
STEPS, COUNTED = 16, 4
# Small models would drown in the shipped files' buckets of 200 million elements.
SMALL_BUCKET = 4_000_000
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
GEOMETRIES = {
    "qwen3, 19 M": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "llama, 41 M": {
        "model_type": "llama",
        "hidden_size": 320,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Cell:
    """One measured run. shipped_buckets: DeepSpeed's file as it is shipped."""

    model: str
    method: str
    strategy: str
    ranks: int
    pack_tokens: int = 1024
    checkpointing: bool = False
    dtype: str = "float32"
    accumulation: int = 1
    shipped_buckets: bool = False

    @property
    def name(self) -> str:
        """For people."""
        extra = [f"packs of {self.pack_tokens}", self.dtype]
        extra += ["checkpointing"] * self.checkpointing + [f"accumulation {self.accumulation}"] * (self.accumulation > 1)
        return f"{self.model}, {self.method}, {self.strategy} on {self.ranks}, {', '.join(extra)}"

    @property
    def overrides(self) -> list[str]:
        """Of the recipe quickstart."""
        return [
            f"model.method={self.method}",
            f"model.dtype={self.dtype}",
            "model.trained_layers=4",
            "task.modes=[off,on]",
            "task.on_share=1",
            f"distributed.strategy={'auto' if self.strategy == 'cpu' else self.strategy}",
            f"train.pack_tokens={self.pack_tokens}",
            f"train.packs_per_step={self.ranks * self.accumulation}",
            f"train.gradient_checkpointing={str(self.checkpointing).lower()}",
        ]


QWEN, LLAMA = GEOMETRIES
SMOL = "smollm2-135m"
CELLS = [
    Cell(QWEN, "full", "cpu", 1),
    Cell(QWEN, "full", "cpu", 1, checkpointing=True),
    Cell(LLAMA, "full", "cpu", 1, accumulation=2),
    Cell(QWEN, "lora", "cpu", 1),
    Cell(LLAMA, "lora", "cpu", 1, pack_tokens=2048),
    Cell(QWEN, "qlora", "cpu", 1),
    Cell(QWEN, "freeze", "cpu", 1),
    Cell(QWEN, "full", "cpu", 1, dtype="bfloat16"),
    Cell(QWEN, "lora", "cpu", 1, dtype="bfloat16"),
    Cell(LLAMA, "full", "ddp", 2),
    Cell(LLAMA, "full", "zero1", 2),
    Cell(LLAMA, "full", "zero2", 2),
    Cell(QWEN, "full", "zero3", 2),
    Cell(LLAMA, "full", "zero3", 4, pack_tokens=512),
    Cell(LLAMA, "full", "zero2", 2, dtype="bfloat16", pack_tokens=512),
    Cell(LLAMA, "full", "zero3", 2, dtype="bfloat16", pack_tokens=512),
    Cell(LLAMA, "lora", "zero2", 2),
    Cell(QWEN, "lora", "zero3", 2),
    Cell(SMOL, "full", "cpu", 1, pack_tokens=512),
    Cell(SMOL, "lora", "cpu", 1, checkpointing=True),
    Cell(SMOL, "full", "zero3", 2, pack_tokens=512, shipped_buckets=True),
]


def main() -> None:
    """Measure, predict, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="cells whose name contains this")
    parser.add_argument("--measured", type=Path, help="an earlier result: predict anew for its cells and devices")
    args = parser.parse_args()
    before = {} if args.measured is None else {each["cell"]: each for each in json.loads(args.measured.read_text())["cells"]}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        results = [compared(cell, work, before.get(cell.name)) for cell in CELLS if args.only is None or args.only in cell.name]
    worst = sorted(results, key=lambda each: -abs(each["memory_error"]))
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(),
        "cells": worst,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    for each in worst:
        print(f"memory {each['memory_error']:+.1%}  time {each['time_error']:+.1%}  {each['cell']}")


def compared(cell: Cell, work: Path, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """What a cell took and what was predicted for it; errors relative to what was measured. earlier: when it was."""
    model = model_folder(cell.model, work)
    device = work / "device.json"
    if earlier is None:
        probe = [str(Path(sys.executable).with_name("guardtrain")), "bench", "device", *recipe_of(cell, model)]
        probe += ["--ranks", str(cell.ranks), "--dtype", cell.dtype, "--threads", str(threads(cell)), "--json-file", str(device)]
        run(probe, cell, work)
        counted, seconds = trained(cell, model, work)
    else:
        device.write_text(json.dumps(earlier["device"]))
        counted, seconds = earlier["measured_bytes"], earlier["measured_seconds"]
    predicted = prediction(cell, read_geometry(model), read_device(device))
    result = {
        "cell": cell.name,
        "measured_bytes": counted,
        "predicted_bytes": round(predicted.peak.total),
        "memory_error": predicted.peak.total / counted - 1,
        "peak": {"moment": predicted.peak.name, **{kind: round(size) for kind, size in predicted.peak.parts.items()}},
        "measured_seconds": seconds,
        "predicted_seconds": predicted.time.total,
        "time_error": predicted.time.total / seconds - 1,
        "terms": predicted.time.terms,
        "device": json.loads(device.read_text()),
    }
    print(json.dumps(result), file=sys.stderr)
    return result


def recipe_of(cell: Cell, model: str) -> list[str]:
    """The recipe and its overrides."""
    return ["quickstart", f"model.name={model}", *cell.overrides]


def prediction(cell: Cell, geometry: Geometry, device: Device) -> Candidate:
    """The planner's candidate for the recipe as it stands."""
    recipe = load_recipe("quickstart", cell.overrides)
    cluster = Cluster(
        nodes=1,
        gpus_per_node=cell.ranks,
        device=device,
        network_bandwidth=device.link_bandwidth,
        host_bytes=device.memory_bytes,
    )
    workload = workload_of(recipe)
    asked = as_asked(recipe, geometry, workload, cluster)
    engine = asked.setup.engine
    if engine is None or cell.shipped_buckets:
        return asked
    small = dataclasses.replace(engine, reduce_bucket=SMALL_BUCKET, allgather_bucket=SMALL_BUCKET, prefetch_bucket=SMALL_BUCKET)
    return assess(geometry, workload, cluster, cell.strategy, dataclasses.replace(asked.setup, engine=small))


def trained(cell: Cell, model: str, work: Path) -> tuple[int, float]:
    """(most tensor bytes of any rank, median seconds of a later step)."""
    folder = Path(tempfile.mkdtemp(dir=work))
    recipe = [
        *recipe_of(cell, model),
        f"train.max_steps={STEPS}",
        "train.log_steps=1",
        "train.watch_steps=0",
        "train.save_steps=1000",
        "train.epochs=100",
        "evaluate.max_rows=8",
        "evaluate.modes=[off]",
    ]
    recipe += [f"output.dir={folder / 'run'}"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration(cell, folder))]
    launch += ["--num_processes", str(cell.ranks), "--main_process_port", "0", str(ROOT / "benchmarks/plan_rank.py"), *recipe]
    run(launch, cell, folder)
    peaks = [json.loads(path.read_text())["training_peak"] for path in folder.glob("rank-*.json")]
    assert len(peaks) == cell.ranks
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    times = [record["seconds"] for record in records if "loss" in record]
    steps = [later - earlier for earlier, later in zip(times[COUNTED:], times[COUNTED + 1 :], strict=False)]
    return max(peaks), statistics.median(steps)


def configuration(cell: Cell, folder: Path) -> Path:
    """The shipped accelerate configuration, with small buckets unless the cell keeps the shipped ones."""
    shipped = ROOT / f"launch/accelerate/{cell.strategy}.yaml"
    if not cell.strategy.startswith("zero") or cell.shipped_buckets:
        return shipped
    tree = yaml.safe_load(shipped.read_text())
    engine = json.loads((ROOT / tree["deepspeed_config"]["deepspeed_config_file"]).read_text())
    engine["zero_optimization"].update({key: SMALL_BUCKET for key in BUCKETS if key in engine["zero_optimization"]})
    (folder / "engine.json").write_text(json.dumps(engine))
    tree["deepspeed_config"]["deepspeed_config_file"] = str(folder / "engine.json")
    (folder / "launch.yaml").write_text(yaml.safe_dump(tree))
    return folder / "launch.yaml"


def model_folder(name: str, work: Path) -> str:
    """A random model of a geometry with the embedded model's tokenizer; the embedded model itself by its name."""
    from guardtrain.model.load import EMBEDDED_MODEL, resolve

    if name == EMBEDDED_MODEL:
        return name
    folder = work / name.replace(", ", "-").replace(" ", "")
    if not folder.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(resolve(EMBEDDED_MODEL).path)
        geometry = dict(GEOMETRIES[name])
        kind = geometry.pop("model_type")
        torch.manual_seed(3)
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), max_position_embeddings=4096, **geometry)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def threads(cell: Cell) -> int:
    """Each rank has its share of the cores."""
    return max(1, (os.cpu_count() or 1) // cell.ranks)


def run(command: list[str], cell: Cell, folder: Path) -> None:
    """Run to the end; a failure ends everything with what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads(cell)), "PYTHONPATH": str(ROOT), "PLAN_CELL": str(folder)}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{cell.name} failed:\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()
