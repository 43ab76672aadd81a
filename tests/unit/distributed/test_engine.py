"""DeepSpeed's files and the recipe: what is filled in, what is refused, and that DeepSpeed itself takes every shipped file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from guardtrain.distributed.engine import StepShape, drop_stale_locks, launched_file, read_file, resolve, zero_stage
from guardtrain.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]
FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))
IDS = [file.stem for file in FILES]
SHAPE = StepShape(packs_per_step=8, world_size=2, max_grad_norm=0.5, dtype="bfloat16")


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_the_recipes_values_are_filled_in(file: Path) -> None:
    resolved = resolve(read_file(file), SHAPE, where=file.name)
    assert (resolved["train_batch_size"], resolved["gradient_accumulation_steps"]) == (8, 4)
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_clipping"]) == (1, 0.5)
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (True, False)
    assert zero_stage(resolved) == int(file.stem.removeprefix("zero")[0])


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_deepspeeds_own_classes_take_every_value(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
    from deepspeed.runtime.zero.config import get_zero_config

    resolved = resolve(read_file(file), SHAPE, where=file.name)
    zero = get_zero_config(resolved)
    for key, value in resolved["zero_optimization"].items():
        name = {field.alias: name for name, field in type(zero).model_fields.items() if field.alias}.get(key, key)
        assert name in type(zero).model_fields, f"{file.name}: DeepSpeed knows no {key}"
        if not isinstance(value, dict):
            assert getattr(zero, name) == value
    assert get_bfloat16_config(resolved).enabled
    assert not get_float16_config(resolved).enabled


def test_files_that_share_a_stage_differ_only_where_their_names_say_so() -> None:
    trees = {file.stem: read_file(file) for file in FILES}
    for stem, tree in trees.items():
        base = trees[stem[: len("zero0")]]
        different = {
            key for key in tree["zero_optimization"] if tree["zero_optimization"][key] != base["zero_optimization"].get(key)
        }
        allowed = {"offload_optimizer", "offload_param"} if "offload" in stem or "nvme" in stem else set()
        assert different <= allowed | ({"zero_hpz_partition_size"} if "hpz" in stem else set()), stem
        assert {key: value for key, value in tree.items() if key != "zero_optimization"} == {
            key: value for key, value in base.items() if key != "zero_optimization"
        }, stem


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"gradient_clipping": 1.0},
            r"f.json: gradient_clipping: .*contradicts.* expected 0.5, from train.max_grad_norm, found 1.0",
        ),
        ({"train_batch_size": 16}, r"f.json: train_batch_size: .* expected 8, from train.packs_per_step, found 16"),
        ({"bf16": {"enabled": False}}, r"f.json: bf16.enabled: .* expected True, from model.dtype=bfloat16, found False"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r'f.json: zero_optimization.reduce_bucket_size: "auto" hides'),
        ({"optimizer": {"type": "AdamW"}}, r"f.json: optimizer: the file brings its own optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, r"f.json: scheduler: the file brings its own scheduler"),
    ],
)
def test_contradictions_name_both_values(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tree, SHAPE, where="f.json")


def test_what_agrees_may_be_said_twice_and_the_file_stays_as_it_is() -> None:
    tree = {"gradient_clipping": 0.5, "bf16": {"enabled": True}}
    assert resolve(tree, SHAPE, where="f.json")["gradient_clipping"] == 0.5
    assert tree == {"gradient_clipping": 0.5, "bf16": {"enabled": True}}


@pytest.mark.parametrize(("packs", "ranks", "expected"), [(3, 2, "2 or 4"), (1, 4, "expected 4,"), (9, 4, "8 or 12")])
def test_packs_that_cannot_be_shared_out(packs: int, ranks: int, expected: str) -> None:
    shape = StepShape(packs_per_step=packs, world_size=ranks, max_grad_norm=1.0, dtype="float32")
    with pytest.raises(ConfigError, match=f"train.packs_per_step: .*among {ranks} ranks.*{expected}.*found {packs}"):
        resolve({}, shape, where="f.json")


def test_locks_of_compilers_that_were_killed_do_not_stop_later_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, held = (tmp_path / name / "lock" for name in ("cpu_adam", "async_io"))
    for lock in (stale, held):
        lock.parent.mkdir()
        lock.touch()
    an_hour_ago = time.time() - 3600
    os.utime(stale, (an_hour_ago, an_hour_ago))
    assert drop_stale_locks() == [stale]
    assert (stale.exists(), held.exists()) == (False, True)


def test_a_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.json").write_text('{"a": 1,\n"b" 2}')
    with pytest.raises(ConfigError, match=r"broken.json:2: broken JSON"):
        read_file(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match=r"missing.json: cannot be read, expected a DeepSpeed file, found No such file"):
        read_file(tmp_path / "missing.json")
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="not an object, expected a DeepSpeed file, found list"):
        read_file(tmp_path / "list.json")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert launched_file() is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed is asked for without a file"):
        launched_file()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero2.json")
    assert launched_file() == Path("ds_configs/zero2.json")
