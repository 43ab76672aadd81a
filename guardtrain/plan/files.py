"""What is needed to run a plan, written into a folder: the recipe, the launchers' files, the script that starts it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from guardtrain.config import Recipe
from guardtrain.distributed.launch import BATCH_SCRIPT, NODE_SCRIPT, Cluster, configuration, deepspeed_file
from guardtrain.errors import ConfigError
from guardtrain.overrides import dump_recipe, load_recipe
from guardtrain.plan.hardware import GIB
from guardtrain.plan.report import described, duration, hours, job_resources, overrides
from guardtrain.plan.search import Candidate, Plan


def write_files(plan: Plan, candidate: Candidate, arguments: list[str], folder: Path) -> list[Path]:
    """Write `candidate` of `plan` into a new folder. arguments: the recipe's name and overrides as typed.

    recipe.yaml: the recipe with what the plan changes; accelerate.yaml and, under ZeRO, deepspeed.json: the shipped ones for this
    cluster; run.sh: starts it, as a Slurm job where there are several nodes. One process needs no accelerate.yaml. Raises
    ConfigError for a folder with something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("is there already", where=f"--out {folder}", expected="a new or empty folder")
    name, *given = arguments
    recipe = load_recipe(name, [*given, *overrides(plan, candidate)])
    folder.mkdir(parents=True, exist_ok=True)
    files = {"recipe.yaml": f"# {headline(plan, candidate)}\n{dump_recipe(recipe)}"}
    if not candidate.is_plain:
        files |= _launch_files(recipe, candidate, folder.resolve())
    files["run.sh"] = _script(plan, candidate)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    (folder / "run.sh").chmod(0o755)
    return [folder / file for file in files]


def headline(plan: Plan, candidate: Candidate) -> str:
    """The plan in a line."""
    memory = f"{candidate.device_bytes / GIB:.1f} GiB a GPU, {candidate.host.total / GIB:.0f} GiB a host"
    time = f"{candidate.time.total:.2f} s a step, {duration(hours(plan, candidate))} in all"
    return f"planned: {plan.geometry.name}, {described(candidate)}, on {candidate.cluster}: {memory}, {time}"


def _launch_files(recipe: Recipe, candidate: Candidate, folder: Path) -> dict[str, str]:
    cluster = candidate.cluster
    shipped = configuration(recipe.distributed.strategy, Cluster(nodes=cluster.nodes, gpus_per_node=cluster.gpus_per_node))
    values = {"num_machines": str(cluster.nodes), "num_processes": str(cluster.ranks)}
    files: dict[str, str] = {}
    if (engine := deepspeed_file(shipped)) is not None:
        files["deepspeed.json"] = engine.read_text("utf-8")
        values["deepspeed_config_file"] = json.dumps(str(folder / "deepspeed.json"))  # a string in YAML too
    return {"accelerate.yaml": _with_values(shipped.read_text("utf-8"), values), **files}


def _with_values(text: str, values: dict[str, str]) -> str:
    """A YAML file without its comments, which speak of what is shipped, and with other values for some keys."""
    lines = []
    for line in text.splitlines():
        key, separator, _ = line.partition(": ")
        lines.append(f"{key}: {values[key.strip()]}" if separator and key.strip() in values else line)
    return "\n".join(line for line in lines if not line.startswith("#")) + "\n"


def _script(plan: Plan, candidate: Candidate) -> str:
    cluster = candidate.cluster
    lines = [
        "#!/usr/bin/env bash",
        f"# {headline(plan, candidate)}",
        "# Options of a run are passed on: --resume, --auto-resume.",
    ]
    lines += ["set -euo pipefail", 'here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)']
    if candidate.is_plain:
        return "\n".join([*lines, 'exec guardtrain train "$here/recipe.yaml" "$@"', ""])
    task = '"$here/accelerate.yaml" "$here/recipe.yaml" "$@"'
    node = f"bash {shlex.quote(str(NODE_SCRIPT))} {task}"
    if cluster.nodes == 1:
        return "\n".join([*lines, f"NNODES=1 GPUS_PER_NODE={cluster.gpus_per_node} exec {node}", ""])
    by_hand = f"NNODES={cluster.nodes} NODE_RANK=0 MASTER_ADDR=FIRST_HOST GPUS_PER_NODE={cluster.gpus_per_node}"
    lines += ["# This folder and the recipe's data must be where all nodes see them."]
    lines += [f"# Without Slurm, the same on every host, NODE_RANK from 0 to {cluster.nodes - 1}:", f"#   {by_hand} {node}"]
    root = NODE_SCRIPT.parents[1]
    sbatch = ["sbatch", f"--nodes={cluster.nodes}", f"--gpus-per-node={cluster.gpus_per_node}"]
    sbatch += [
        *job_resources(plan, candidate),
        f"--export=ALL,GUARDTRAIN_ROOT={root},GPUS_PER_NODE={cluster.gpus_per_node}",
        str(BATCH_SCRIPT),
    ]
    return "\n".join([*lines, f"exec {shlex.join(sbatch)} {task}", ""])
