"""Exports, and the end of a ZeRO-3 run, equal the engine's weights bit for bit, in memory that does not depend on their size."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import METHODS, REPOSITORY, Launched, rank_environment
from safetensors.torch import load_file, save_file

from guardtrain import streams
from guardtrain.distributed.shards import engine_streams
from guardtrain.errors import CheckpointError
from guardtrain.model.tensor_files import INDEX, model_streams
from guardtrain.streams import TensorStream

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(1800)]

RANKS = 3
SHARD_BYTES = 48_000_000
HERE = Path(__file__).parent
TIED = {"zero1", "zero1-freeze", "zero2-half", "zero2-aligned", "zero3", "zero3-freeze", "zero3-groups"}
UNTIED = {"zero1-half", "zero2-untied", "zero2-freeze", "zero3-half", "zero3-freeze-untied"}
UNTIED |= {"zero2-offload", "zero3-offload"}
SPLIT = sorted(name for name in TIED | UNTIED if name.startswith("zero3"))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for each engine of export_ranks.py, as the run that would have left it. Deleted afterwards: it is large."""
    root = tmp_path_factory.mktemp("engines")
    script = [str(HERE / "export_ranks.py"), str(root)]
    # What is freed goes back to the system at once: else glibc keeps buffers of up to 32 MB, and the ranks' memory is as large as
    # the heap happens to be cut up, 0 to 170 MB more from one run to the next, with nothing held by anybody.
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    call([*started, *script], MALLOC_MMAP_THRESHOLD_=str(2**20))
    for run in root.iterdir():
        write_recipe(run, "full", "smollm2-135m")
        (checkpoint,) = (run / "checkpoints").iterdir()
        (checkpoint / "config.json").write_bytes((run / "config.json").read_bytes())
        (checkpoint / "tokenizer_config.json").write_text("{}")
    yield root
    shutil.rmtree(root)


def write_recipe(run: Path, method: str, base: str) -> None:
    (run / "recipe.yaml").write_text(f"model: {{name: {base}, method: {method}}}\ntask: instruct\n")


def environment() -> dict[str, str]:
    return {**rank_environment(), "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}


def call(command: list[str], **variables: str) -> str:
    done = subprocess.run(command, env={**environment(), **variables}, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def whole(stream: TensorStream) -> torch.Tensor:
    return torch.cat(list(stream.chunks())).view(stream.shape)


def reference(run: Path, *, tied: bool) -> dict[str, torch.Tensor]:
    """The engine's own weights; of tied ones the first."""
    weights = load_file(run / "reference.safetensors")
    if tied:
        assert torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    return weights


@pytest.mark.parametrize("name", sorted(TIED | UNTIED))
def test_every_layout_of_zero_is_read_bit_for_bit(engines: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1000)
    expected = reference(engines / name, tied=name in TIED)
    found = {stream.name: stream for stream in engine_streams(engines / name / "checkpoints" / "checkpoint-1")}
    assert list(found) == [key for key in found if key in expected]
    assert found.keys() == expected.keys()
    for key, stream in found.items():
        assert stream.dtype == expected[key].dtype, key
        assert torch.equal(whole(stream), expected[key]), key


@pytest.mark.parametrize("name", ["zero1-half", "zero2-half", "zero3-half"])
def test_the_optimizers_own_float32_weights_can_be_had(engines: Path, name: str) -> None:
    expected = reference(engines / name, tied=name in TIED)
    finer = 0
    for stream in engine_streams(engines / name / "checkpoints" / "checkpoint-1", torch.float32):
        found = whole(stream)
        assert found.dtype == torch.float32
        assert torch.equal(found.to(torch.bfloat16), expected[stream.name])
        finer += not torch.equal(found, expected[stream.name].float())
    assert finer, "the step was smaller than bfloat16 shows"


@pytest.mark.parametrize("name", SPLIT)
def test_the_end_of_a_split_run_saves_the_same_without_gathering_it(engines: Path, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, expected = engines / name / "split", reference(engines / name, tied=name in TIED)
    found = {stream.name: whole(stream) for stream in model_streams(folder)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert len(set(json.loads((folder / INDEX).read_text())["weight_map"].values())) > 5
    shutil.copytree(folder, tmp_path / "model")
    shutil.copy(engines / name / "config.json", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_weights_that_are_not_all_there_are_refused(engines: Path, tmp_path: Path) -> None:
    """As after swapping to NVMe, which leaves empty vectors behind."""
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(engines / "zero3" / "checkpoints" / "checkpoint-1", checkpoint)
    file = checkpoint / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    saved = torch.load(file, weights_only=False)
    saved["optimizer_state_dict"]["fp32_flat_groups"][1] = torch.empty(0)
    torch.save(saved, file)
    with pytest.raises(CheckpointError, match=r"rank 1: the optimizer's weights do not fit the model.*NVMe"):
        engine_streams(checkpoint)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine_streams(checkpoint)


def export_measured(engines: Path, large: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "export_memory.py"), str(engines / "zero3"), str(large), str(out), str(SHARD_BYTES)]
    done: dict[str, Any] = json.loads(call(command).splitlines()[-1])
    assert done["bytes"] > 600_000_000
    assert len(done["files"]) > 12
    return done


def test_memory_is_bounded_by_two_shards(engines: Path) -> None:
    """Of a model of 0.6 GB in files of 48 MB: from ZeRO's shards, at the end of a run, and merging an adapter into it."""
    giant = engines / "zero3-giant"
    exported = export_measured(engines, giant, engines / "exported")
    saved = {path.name: path for path in (giant / "split").glob("*.safetensors")}
    assert saved.keys() == exported["files"].keys()
    for name, path in saved.items():
        assert path.read_bytes() == (engines / "exported" / name).read_bytes(), name
    base = {stream.name: stream for stream in model_streams(engines / "exported")}
    adapted = write_adapter(engines / "adapted", base, engines / "exported")
    merged = export_measured(engines, engines / "adapted", engines / "merged")
    for stream in model_streams(engines / "merged"):
        expected = whole(base[stream.name])
        if stream.name in adapted:
            a, b = adapted[stream.name]
            expected = expected + 2 * (b @ a)
        assert torch.allclose(whole(stream), expected, atol=1e-6), stream.name
    growth = {
        "exported": exported["growth"],
        "merged": merged["growth"],
        "saved": json.loads((giant / "growth.json").read_text()),
    }
    print("growth of memory in MB:", {name: round(each / 1e6) for name, each in growth.items()})
    assert max(growth.values()) < 2 * SHARD_BYTES, growth


def write_adapter(run: Path, base: dict[str, TensorStream], base_folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A run whose adapter changes every matrix of every layer."""
    from peft import LoraConfig

    torch.manual_seed(2)
    matrices = [stream for name, stream in base.items() if ".layers." in name and len(stream.shape) == 2]
    pairs = {each.name: (torch.randn(8, each.shape[1]), torch.randn(each.shape[0], 8)) for each in matrices}
    (run / "model").mkdir(parents=True)
    names = {name: f"base_model.model.{name.removesuffix('.weight')}" for name in pairs}
    halves = [{f"{names[name]}.lora_{half}.weight": pair[half == "B"] for name, pair in pairs.items()} for half in "AB"]
    save_file(halves[0] | halves[1], run / "model" / "adapter_model.safetensors")
    LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16).save_pretrained(run / "model")
    (run / "model" / "tokenizer_config.json").write_text("{}")
    shutil.copy(base_folder / "config.json", run / "model")
    write_recipe(run, "lora", str(base_folder))
    return pairs


def test_it_goes_on_after_a_kill_and_notices_what_changed_since(engines: Path) -> None:
    giant, out = engines / "zero3-giant", engines / "resumed"
    options = ["--to", "merged", "--shard-gb", str(SHARD_BYTES / 1e9), "--out", str(out), "--json"]
    command = [sys.executable, "-c", "from guardtrain.cli import main; main()", "export", str(giant), *options]
    journal = engines / "tmp-resumed" / "export.json"
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not journal.exists() or len(json.loads(journal.read_text())["files"]) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    noted = json.loads(journal.read_text())["files"]
    flipped, *intact = noted
    with (journal.parent / flipped).open("r+b") as file:
        file.seek(20_000_000)
        byte = file.read(1)[0]
        file.seek(20_000_000)
        file.write(bytes([byte ^ 1]))
    done = json.loads(call(command))
    assert done["kept"] == intact
    assert len(intact) >= 2
    assert not journal.parent.exists()
    for path in (giant / "split").glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_runs_checkpoint_is_exported_as_its_own_model(
    method: str, launch: Callable[..., Launched], guardtrain: Any, rows_file: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    steps = ["train.max_steps=2", "train.save_steps=2", "evaluate.max_rows=8"]
    launched = launch(run, "zero3", *METHODS[method], *steps)
    assert launched.code == 0, launched.said[-4000:]
    called = guardtrain("export", run, "--to", "merged", "--checkpoint", "checkpoint-2", "--out", tmp_path / "out", "--json")
    assert called.code == 0, called.err
    assert json.loads(called.out)["tensors"] > 20
    if method == "full":
        for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
            assert (tmp_path / "out" / name).read_bytes() == (run / "model" / name).read_bytes(), name
    else:
        assert guardtrain("export", run, "--to", "adapter", "--checkpoint", "checkpoint-2").code == 0
        copy = run / "exported" / "adapter-checkpoint-2" / "adapter_model.safetensors"
        assert copy.read_bytes() == (run / "model" / copy.name).read_bytes()
    scores = [scores_of(guardtrain, folder, rows_file, tmp_path / f"{folder.name}.jsonl") for folder in (run, tmp_path / "out")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def scores_of(guardtrain: Any, model: Path, rows_file: str, file: Path) -> list[float]:
    called = guardtrain("evaluate", model, rows_file, "--modes", "off", "--scores", file)
    assert called.code == 0, called.err
    return [json.loads(line)["scores"]["off"] for line in file.read_text().splitlines()]
