"""A run says which rows it was trained on, without their texts, and keeps saying so when it is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guardtrain.data.hashes import HASHES_FILE, RowHashes
from guardtrain.data.keys import prompt_texts
from guardtrain.evaluate.contamination import find_contaminated
from guardtrain.evaluate.study import training_rows
from guardtrain.inference.guards import load_guard


def test_a_run_knows_its_training_rows(guardtrain: Any, tiny_run: Any, tmp_path: Path, rows_file: str) -> None:
    assert guardtrain(*tiny_run("train.max_steps=1")).code == 0
    run, prompts = tmp_path / "run", [json.loads(line)["prompt"] for line in Path(rows_file).read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    is_trained_N = RowHashes.read(run / "model").contains(prompts)
    assert (is_trained_N.sum(), (~is_trained_N).sum()) == (summary["training_rows"], summary["held_out_rows"])
    # What is read again through the recipe is what was hashed while training.
    rows, why_none = training_rows(str(run), load_guard(str(run)))
    assert rows is not None, why_none
    texts = prompt_texts(rows.train)
    assert RowHashes.of(texts).digests_N.tolist() == RowHashes.read(run / "model").digests_N.tolist()
    assert {found.kind for found in find_contaminated(texts, texts)} == {"exact"}
    exported = guardtrain("export", run, "--to", "merged", "--out", tmp_path / "merged")
    assert exported.code == 0, exported.err
    assert (tmp_path / "merged" / HASHES_FILE).read_bytes() == (run / "model" / HASHES_FILE).read_bytes()
