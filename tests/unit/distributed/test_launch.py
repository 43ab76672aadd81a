"""What `guardtrain launch` would type, held in files: whoever changes a command sees the change."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guardtrain.distributed.launch import ROOT, Cluster, Command, Start, plan_start
from guardtrain.errors import ConfigError
from guardtrain.overrides import load_recipe

GOLDEN = Path(__file__).parents[2] / "golden"
STARTS = {
    "one-machine": (["train.packs_per_step=8"], Cluster(gpus_per_node=8)),
    "two-hosts-by-hand": (["distributed.strategy=zero3", "train.packs_per_step=16"], Cluster(nodes=2, gpus_per_node=8)),
    "slurm": (
        ["distributed.strategy=zero3_hpz", "train.packs_per_step=32"],
        Cluster(nodes=4, gpus_per_node=8, slurm=True, sbatch_options=("--time=24:00:00", "--comment=a b")),
    ),
}


def start_of(overrides: list[str], cluster: Cluster, *flags: str) -> Start:
    return plan_start(load_recipe("quickstart", overrides), ["quickstart", *overrides, *flags], cluster)


@pytest.mark.parametrize("name", STARTS)
def test_commands_are_those_of_the_golden_file(name: str) -> None:
    overrides, cluster = STARTS[name]
    shown = plan_start(load_recipe("quickstart", overrides), ["quickstart", *overrides], cluster).shown()
    assert shown.replace(str(ROOT), "REPOSITORY") == (GOLDEN / f"launch-{name}.txt").read_text("utf-8")


def test_dry_run_prints_it_and_starts_nothing() -> None:
    guardtrain = Path(sys.executable).with_name("guardtrain")
    command = [guardtrain, "launch", "quickstart", "train.packs_per_step=8", "--gpus-per-node", "8", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.replace(str(ROOT), "REPOSITORY") == (GOLDEN / "launch-one-machine.txt").read_text("utf-8")


def test_packs_that_cannot_be_shared_out_are_refused_before_anything_waits_in_a_queue() -> None:
    with pytest.raises(ConfigError, match=r"train.packs_per_step: .* among 8 ranks, expected 8, found 1"):
        start_of(["train.packs_per_step=1"], Cluster(gpus_per_node=8, slurm=True))


def test_hpz_wants_the_nodes_that_its_file_was_made_for() -> None:
    with pytest.raises(ConfigError, match=r"--gpus-per-node: .*expected 8, as zero_hpz_partition_size .* found 4"):
        start_of(["distributed.strategy=zero3_hpz", "train.packs_per_step=8"], Cluster(nodes=2, gpus_per_node=4))


def test_the_recipe_must_agree_with_the_deepspeed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import guardtrain.distributed.launch as launch

    folder = tmp_path / "launch" / "accelerate"
    folder.mkdir(parents=True)
    (folder / "zero2.yaml").write_text("deepspeed_config:\n  deepspeed_config_file: ds.json\n")
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.5}')
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match=r"ds.json: gradient_clipping: .* expected 1.0, from train.max_grad_norm, found 0.5"):
        start_of(["distributed.strategy=zero2", "train.packs_per_step=2"], Cluster(gpus_per_node=2))


def test_without_deepspeed_one_rank_does_without_it_and_several_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    start = start_of(["distributed.strategy=zero3"], Cluster())
    assert start.config.stem == "single_gpu"
    with pytest.raises(ConfigError, match=r"distributed.strategy=zero3: needs deepspeed"):
        start_of(["distributed.strategy=zero3", "train.packs_per_step=2"], Cluster(gpus_per_node=2))


def test_arguments_are_quoted() -> None:
    assert str(Command(["echo", "a b"], {"X": "c d"})) == "X='c d' echo 'a b'"


def test_signals_reach_what_was_started(tmp_path: Path) -> None:
    marker = tmp_path / "told"
    inner = f"trap 'echo told > {marker}; exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    outer = f"from guardtrain.distributed.launch import *; raise SystemExit(execute(Command(['bash', '-c', {inner!r}])))"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)  # the terminal was closed: the run is told to end
    assert process.wait(timeout=20) == 75
    assert marker.read_text() == "told\n"


def test_no_sbatch_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from guardtrain.distributed.launch import execute

    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="sbatch: not installed"):
        execute(Command(["sbatch", "x"]))
