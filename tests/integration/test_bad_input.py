"""Mistakes that people make: one clear line, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refused

GOOD = {"prompt": "How long is a prompt?", "label": "benign"}


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + ("\n" if lines else ""), encoding="utf-8")
    return str(path)


def row(number: int, label: str, prompt: str | None = None) -> str:
    return json.dumps({"prompt": prompt or f"Question number {number} about {label} things, please", "label": label})


def mixed_rows(count: int) -> list[str]:
    return [row(number, "malicious" if number % 2 else "benign") for number in range(count)]


def test_broken_json_names_file_and_line(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    lines = mixed_rows(12)
    lines[6] = '{"prompt": "half a line'
    path = write_lines(tmp_path / "broken.jsonl", lines)
    check_refused(guardtrain(*tiny_run(f"data.train={path}")), "broken.jsonl:7")
    checked = guardtrain("data", "check", path)
    assert checked.code == 2
    assert "broken.jsonl:7" in checked.out
    assert not (tmp_path / "run").exists()


def test_broken_row_is_set_aside_when_asked(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    lines = mixed_rows(12)
    lines[6] = json.dumps({"prompt": "", "label": "benign", "id": "empty-one"})
    path, rejects = write_lines(tmp_path / "rows.jsonl", lines), tmp_path / "rejects.jsonl"
    called = guardtrain(*tiny_run(f"data.train={path}", f"data.rejects={rejects}", "train.max_steps=1"))
    assert called.code == 0, called.err
    (reject,) = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert reject["where"].endswith("rows.jsonl:7")
    assert reject["row"]["id"] == "empty-one"


def test_unknown_key_names_the_nearest(guardtrain: Any, tiny_run: Any) -> None:
    check_refused(guardtrain(*tiny_run("train.learning_rte=1e-4")), "train.learning_rte", "train.learning_rate")


def test_unknown_recipe_names_the_nearest(guardtrain: Any) -> None:
    check_refused(guardtrain("train", "quikstart"), "quikstart", "quickstart")


def test_missing_model(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    check_refused(guardtrain(*tiny_run(f"model.name={tmp_path / 'nowhere'}")), "nowhere")
    check_refused(guardtrain("evaluate", tmp_path / "nowhere", "starter"), "nowhere")


def test_folder_without_a_model(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_refused(guardtrain(*tiny_run(f"model.name={tmp_path / 'empty'}")), "empty", "config.json")


def test_empty_file(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "empty.jsonl", [])
    check_refused(guardtrain(*tiny_run(f"data.train={path}")), "empty.jsonl")
    assert guardtrain("data", "check", path).code == 2
    check_refused(guardtrain("evaluate", "smollm2-135m", path), "empty.jsonl")


def test_one_class_only(guardtrain: Any, tiny_run: Any, tiny_folder: str, tmp_path: Path) -> None:
    """Nothing to train on; measured by what there is."""
    path = write_lines(tmp_path / "calm.jsonl", [row(number, "benign") for number in range(8)])
    check_refused(guardtrain(*tiny_run(f"data.train={path}")), "one class")
    figures = json.loads(guardtrain("evaluate", tiny_folder, path, "--modes", "off", "--json").out)["modes"]["off"]
    assert (figures["rows"], figures["auroc"], figures["recall"]) == (8, None, None)
    assert 0 <= figures["false_positive_rate"] <= 1


def test_a_very_long_prompt_is_refused_not_truncated(guardtrain: Any, tiny_run: Any, tiny_folder: str, tmp_path: Path) -> None:
    lines = mixed_rows(12)
    lines[3] = row(3, "malicious", "very long words " * 12_500)
    assert len(json.loads(lines[3])["prompt"]) == 200_000
    path, rejects = write_lines(tmp_path / "long.jsonl", lines), tmp_path / "rejects.jsonl"
    check_refused(guardtrain(*tiny_run(f"data.train={path}")), "long.jsonl:4", "token budget")
    check_refused(guardtrain("evaluate", tiny_folder, path), "long.jsonl:4", "token budget", "--max-prompt-tokens")
    called = guardtrain(*tiny_run(f"data.train={path}", f"data.rejects={rejects}", "train.max_steps=1"))
    assert called.code == 0, called.err
    assert json.loads(rejects.read_text())["where"].endswith("long.jsonl:4")


def test_a_tokenizer_without_a_pad_token_trains(
    guardtrain: Any, tiny_run: Any, tiny_folder: str, fresh_smol_tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "unpadded"
    shutil.copytree(tiny_folder, folder)
    fresh_smol_tokenizer.pad_token = None
    fresh_smol_tokenizer.save_pretrained(folder)
    called = guardtrain(*tiny_run(f"model.name={folder}", "train.max_steps=2"))
    assert called.code == 0, called.err
    assert (tmp_path / "run" / "model" / "guard.json").is_file()


def test_labels_that_share_their_tokens(guardtrain: Any, tiny_run: Any, tiny_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "wordless"
    shutil.copytree(tiny_folder, folder)
    write_wordless_tokenizer(folder)
    check_refused(guardtrain(*tiny_run(f"model.name={folder}")), "labels")


def write_wordless_tokenizer(folder: Path) -> None:
    """A tokenizer that knows neither label: both become the unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[EOS]": 1, "Verdict": 2, ":": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def test_a_policy_or_output_file_that_is_not_there(guardtrain: Any, rows_file: str, tiny_folder: str, tmp_path: Path) -> None:
    check_refused(guardtrain("evaluate", tiny_folder, rows_file, "--policy", tmp_path / "none.txt"), "none.txt")
    scores = tmp_path / "nowhere" / "scores.jsonl"
    check_refused(guardtrain("evaluate", tiny_folder, rows_file, "--modes", "off", "--scores", scores), "scores.jsonl")


@pytest.mark.parametrize(
    "words", [["--nonsense"], ["train"], ["evaluate", "smollm2-135m"], ["trian"], ["evaluate", "a", "b", "--max-rows", "x"]]
)
def test_a_command_line_that_is_off(guardtrain: Any, words: list[str]) -> None:
    called = guardtrain(*words)
    assert called.code == 2
    assert "Usage" in called.err
    assert "Traceback" not in called.err


def test_version_and_help(guardtrain: Any) -> None:
    from guardtrain import __version__

    assert guardtrain("--version").out.strip() == __version__
    assert "quickstart" in guardtrain("--help").out


def test_modes_that_do_not_exist(guardtrain: Any, rows_file: str, tiny_folder: str) -> None:
    check_refused(guardtrain("evaluate", tiny_folder, rows_file, "--modes", "off,loud"), "--modes", "off,loud")


def test_rows_longer_than_the_model_can_place(guardtrain: Any, tiny_run: Any) -> None:
    check_refused(guardtrain(*tiny_run("data.max_prompt_tokens=100000")), "data.max_prompt_tokens", "positions")


def test_another_run_is_not_overwritten(guardtrain: Any, tiny_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    check_refused(guardtrain(*tiny_run("output.overwrite=false")), "not empty")
    check_refused(guardtrain(*tiny_run("output.overwrite=true")), "not a run's")
    assert (folder / "thesis.txt").read_text() == "precious"


def test_resume_without_a_checkpoint(guardtrain: Any, tiny_run: Any) -> None:
    check_refused(guardtrain(*tiny_run(), "--resume"), "nothing to resume")


def test_a_policy_that_leaves_no_room(guardtrain: Any, tiny_run: Any) -> None:
    check_refused(guardtrain(*tiny_run("train.pack_tokens=256", f"task.policy={'many words ' * 200}")), "train.pack_tokens")


def test_a_tracker_that_is_not_installed(guardtrain: Any, tiny_run: Any) -> None:
    check_refused(guardtrain(*tiny_run("train.report_to=[wandb]")), "train.report_to", "wandb")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A real file system of its own, large enough for two checkpoints and, to the eye, for three."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=115m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_intact(guardtrain: Any, tiny_run: Any, small_disk: Path) -> None:
    arguments = tiny_run(f"output.dir={small_disk / 'run'}", "train.save_steps=2", "train.watch_steps=0")
    check_refused(guardtrain(*arguments), "could not be written", "step 6", "intact")
    checkpoints = sorted((small_disk / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4"]
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    resumed = guardtrain(*arguments, "--resume")
    assert resumed.code == 0, resumed.err


def test_a_disk_without_room_for_two_checkpoints_is_refused_before_the_first_step(
    guardtrain: Any, tiny_run: Any, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    called = guardtrain(*tiny_run(f"output.dir={small_disk / 'run'}"))
    check_refused(called, "not fit for this run", "40 MiB free for 3 checkpoints of")
    assert not (small_disk / "run").exists()


@pytest.fixture
def start_run(tiny_run: Any) -> Any:
    """Starts a training run as a process of its own and waits until it has trained a step."""
    processes = []

    def start(run_folder: Path, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from guardtrain.cli import main; main()", *tiny_run(*overrides)]
        pipe, wide = subprocess.PIPE, os.environ | {"COLUMNS": "400"}
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=wide)
        processes.append(process)
        deadline = time.monotonic() + 120
        while not (run_folder / "metrics.jsonl").is_file():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        process.kill()


def test_ctrl_c_saves_and_says_how_to_resume(
    guardtrain: Callable[..., Any], tiny_run: Any, start_run: Any, tmp_path: Path
) -> None:
    process = start_run(tmp_path / "run", "train.epochs=60")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume" in err
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    stopped_at = int(checkpoint.name.rpartition("-")[2])
    total = json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"]
    assert 0 < stopped_at < total
    changed = guardtrain(*tiny_run("train.epochs=60", "train.learning_rate=0.5"), "--resume")
    check_refused(changed, "train.learning_rate", "0.5")


def test_a_policy_that_is_no_text_is_one_line(guardtrain: Any, tmp_path: Path) -> None:
    (tmp_path / "policy.txt").write_bytes(b"\xff\xfe\x00")
    check_refused(
        guardtrain("evaluate", "smollm2-135m", "starter", "--policy", tmp_path / "policy.txt"), "--policy", "policy.txt"
    )


@pytest.mark.parametrize("option", ["--scores", "--json-file"])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_scored(guardtrain: Any, tmp_path: Path, option: str) -> None:
    check_refused(
        guardtrain("evaluate", tmp_path / "no-model", "starter", option, tmp_path / "none" / "x.json"), option, "x.json"
    )
