"""How a recipe is started on one machine, on hosts by hand, or by Slurm: the commands, before any of them runs.

`launch/node.sh` builds the rendezvous flags on every path; here it is only called. No torch import: `--dry-run` answers at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from guardtrain.config import Recipe
from guardtrain.distributed.engine import StepShape, read_file, resolve
from guardtrain.errors import ConfigError

ROOT = Path(__file__).parents[2]
NODE_SCRIPT = ROOT / "launch" / "node.sh"
BATCH_SCRIPT = ROOT / "slurm" / "train.sbatch"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """nodes: machines; gpus_per_node: ranks of each. slurm: submit a job, with `sbatch_options` to it."""

    nodes: int = 1
    gpus_per_node: int = 1
    slurm: bool = False
    sbatch_options: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Command:
    """What is typed on one host: arguments, and what is set in the environment before them."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


@dataclass(frozen=True)
class Start:
    """One way to start a run.

    commands: one for this machine or for sbatch, or one for each host when they are started by hand (`by_hand`).
    on_first_node: what launch/node.sh makes of it there. config: accelerate's. deepspeed: name of the file, and its values with
    the recipe's filled in, as the engine will see them.
    """

    commands: list[Command]
    by_hand: bool
    is_slurm: bool
    nodes: int
    on_first_node: str
    config: Path
    deepspeed: tuple[str, dict[str, object]] | None

    def shown(self) -> str:
        """Every command and file, for people."""
        parts = [f"# {'type on host ' + str(host) if self.by_hand else 'run'}\n{each}" for host, each in enumerate(self.commands)]
        ranks = "1" if self.nodes == 2 else f"1 to {self.nodes - 1}"
        others = f" (on the others --machine_rank {ranks})" if self.nodes > 1 else ""
        parts.append(f"# which starts on {'the first' if self.nodes > 1 else 'this'} machine{others}\n{self.on_first_node}")
        parts.append(f"# {_name(self.config)}\n{self.config.read_text('utf-8').rstrip()}")
        if self.deepspeed is not None:
            name, resolved = self.deepspeed
            parts.append(f"# {name}, with the recipe's values filled in\n{json.dumps(resolved, indent=2)}")
        if self.is_slurm:
            parts.append(f"# {_name(BATCH_SCRIPT)}\n{BATCH_SCRIPT.read_text('utf-8').rstrip()}")
        return "\n\n".join(parts) + "\n"


def plan_start(recipe: Recipe, arguments: list[str], cluster: Cluster) -> Start:
    """The commands that train `recipe`. arguments: of `python -m guardtrain.train`, the recipe's name first.

    Raises ConfigError for what would fail on the nodes: packs that cannot be shared out, a DeepSpeed file that contradicts the
    recipe, hpZ on other nodes than it was made for.
    """
    config = configuration(_possible(recipe.distributed.strategy, cluster), cluster)
    shape = StepShape(
        packs_per_step=recipe.train.packs_per_step,
        world_size=cluster.ranks,
        max_grad_norm=recipe.train.max_grad_norm,
        # "auto" is decided on the machine; on every GPU that this scales to it is bfloat16.
        dtype="bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype,
    )
    assert shape.accumulation  # raises where packs cannot be shared out
    deepspeed = None
    if (file := deepspeed_file(config)) is not None:
        deepspeed = (_name(file), resolve(read_file(file), shape, where=_name(file)))
        _check_hpz(*deepspeed, cluster)
    task = [config.stem, *arguments]
    return Start(
        commands=_commands(task, cluster),
        by_hand=cluster.nodes > 1 and not cluster.slurm,
        is_slurm=cluster.slurm,
        nodes=cluster.nodes,
        on_first_node=_first_node_command(task, cluster),
        config=config,
        deepspeed=deepspeed,
    )


def execute(command: Command) -> int:
    """Run a command to its end and return its exit code. Signals are passed on to all that it starts. Raises ConfigError."""
    # The commands of this environment, also where nobody has activated it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, **command.environment}
    try:
        process = subprocess.Popen(command.arguments, env=environment, process_group=0)
    except FileNotFoundError as error:
        program = command.arguments[0]
        hint = "this machine does not submit Slurm jobs" if program == "sbatch" else None
        raise ConfigError("not installed", where=program, hint=hint) from error

    def pass_on(number: int, frame: FrameType | None) -> None:
        # launch/node.sh takes it on. Whoever closes the terminal wants the run to save and end, as with SIGTERM.
        process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    return process.wait()


def _commands(task: list[str], cluster: Cluster) -> list[Command]:
    if cluster.slurm:
        here = f"--export=ALL,GUARDTRAIN_ROOT={ROOT},GPUS_PER_NODE={cluster.gpus_per_node}"
        asks_itself = any(option.startswith(("--gres", "--gpus")) for option in cluster.sbatch_options)
        gpus = [] if asks_itself else [f"--gpus-per-node={cluster.gpus_per_node}"]
        return [Command(["sbatch", f"--nodes={cluster.nodes}", *gpus, here, *cluster.sbatch_options, str(BATCH_SCRIPT), *task])]
    return [Command(["bash", str(NODE_SCRIPT), *task], _by_hand(node, cluster)) for node in range(cluster.nodes)]


def _by_hand(node: int, cluster: Cluster) -> dict[str, str]:
    """What launch/node.sh is told on a host; the number of nodes too, or it would take that of a Slurm job around it."""
    meeting = {"NODE_RANK": str(node), "MASTER_ADDR": "FIRST_HOST"} if cluster.nodes > 1 else {}
    return {"NNODES": str(cluster.nodes), **meeting, "GPUS_PER_NODE": str(cluster.gpus_per_node)}


def _first_node_command(task: list[str], cluster: Cluster) -> str:
    """The line that launch/node.sh runs on the first node, asked of the script itself; names in capitals are known there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"DRY_RUN": "1"} | (_in_slurm(cluster) if cluster.slurm else _by_hand(0, cluster))
    done = subprocess.run(["bash", str(NODE_SCRIPT), *task], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(done.stderr.strip(), where=str(NODE_SCRIPT))
    return done.stdout.strip()


def _in_slurm(cluster: Cluster) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "0", "SLURM_JOB_NODELIST": "NODES", "SLURM_STEP_NUM_NODES": str(cluster.nodes), "SLURM_NODEID": "0"}
    places = {"MASTER_ADDR": "FIRST_NODE", "MASTER_PORT": "PORT", "GUARDTRAIN_LOG_DIR": "logs/JOB-ranks"}
    return {**job, **places, "GPUS_PER_NODE": str(cluster.gpus_per_node)}


def _possible(strategy: str, cluster: Cluster) -> str:
    """The strategy, or none where DeepSpeed is not installed and there is nothing to share. Raises ConfigError."""
    if not strategy.startswith("zero") or importlib.util.find_spec("deepspeed") is not None:
        return strategy
    if cluster.ranks > 1:
        raise ConfigError("needs deepspeed", where=f"distributed.strategy={strategy}", hint="pip install deepspeed, or ddp")
    return "auto"  # the run itself says that it does without


def configuration(strategy: str, cluster: Cluster) -> Path:
    """The accelerate configuration of a strategy; `auto` takes a copy of the model for each rank. Raises ConfigError."""
    name = strategy if strategy != "auto" else "ddp" if cluster.ranks > 1 else "single_gpu"
    path = ROOT / "launch" / "accelerate" / f"{name}.yaml"
    if not path.is_file():
        hint = "launch/ and slurm/ are part of the repository: install with pip install -e from a clone"
        raise ConfigError("the launch files are not beside the package", where=str(path), hint=hint)
    return path


def _check_hpz(name: str, deepspeed: dict[str, object], cluster: Cluster) -> None:
    zero = deepspeed["zero_optimization"]
    assert isinstance(zero, dict)
    size = zero.get("zero_hpz_partition_size", 1)
    if size not in (1, cluster.gpus_per_node):
        raise ConfigError(
            "hpZ keeps a copy of the weights on each node",
            where="--gpus-per-node",
            expected=f"{size}, as zero_hpz_partition_size in {name}",
            found=str(cluster.gpus_per_node),
        )


def deepspeed_file(config: Path) -> Path | None:
    """The DeepSpeed file that an accelerate configuration names."""
    for line in config.read_text(encoding="utf-8").splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "deepspeed_config_file":
            return ROOT / value
    return None


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()
