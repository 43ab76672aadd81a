"""Two guards from real prompts with their full reports: the random split, and sources that training never saw.

    python benchmarks/guard_report.py random --shared ../shared --work runs/reports --out benchmarks/results
    python benchmarks/guard_report.py unseen --shared ../shared --work runs/reports --out benchmarks/results

Both train SmolLM2-135M on the rows of train.jsonl that have a reason, as many without one, and the starter pairs; a guard of
labels alone trains on the same rows. `random` is measured on dev.jsonl, whose sources are those of training: it flatters
everybody. `unseen` leaves five upstream projects out of training and is measured on them. Thresholds are set on rows held out
from training, never on the rows measured. What is there already is not trained again.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sweep import write_rows

from guardtrain.config import Source
from guardtrain.data.keys import row_key, seeded_rank
from guardtrain.data.sources import load_sources
from guardtrain.data.splits import balanced_subset
from guardtrain.types import GuardExample

# Chosen before any run, so that both classes, injections, jailbreaks and everyday requests are among them.
UNSEEN = {
    "CyberSecEval MITRE": {"cyberseceval_mitre", "cyberseceval_mitre_frr"},
    "InjecAgent": {"injecagent_base", "injecagent_enhanced", "injecagent_user"},
    "BIPIA": {"bipia_email_benign"},
    "PyRIT jailbreak templates": {"pyrit_jailbreak_templates"},
    "Self-Instruct": {"self_instruct"},
}
UNSEEN_SOURCES = set().union(*UNSEEN.values())
ROWS_OF_A_SOURCE = 110  # at most, of each source that is measured unseen: 300 benign rows in all
SEED = 17

TRAIN = [
    "data.max_prompt_tokens=4096",
    "train.learning_rate=2e-4",
    "train.epochs=1",
    "train.save_steps=100",
    "train.watch_steps=0",
    "evaluate.max_rows=600",
    "evaluate.target_fpr=0.01",
    "evaluate.pack_tokens=2048",
]
EXTRAS = {"random": ["--sampled-rows=48"], "unseen": ["--sampled-rows=48", "--attacks"]}
GUARDS = {
    "reasoned": ["task.on_share=0.25", "task.verdict_weight=10"],
    "labels": ["task.modes=[off]", "task.verdict_weight=1"],
}


def main() -> None:
    """Write the rows, train what is not there, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", choices=["random", "unseen"])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, default=Path("runs/reports"))
    parser.add_argument("--out", type=Path, required=True, help="a folder; the report goes into one of its own there")
    args = parser.parse_args()
    folder = args.work / args.split
    folder.mkdir(parents=True, exist_ok=True)
    train, held, test = random_split(args.shared / "data") if args.split == "random" else unseen_split(args.shared / "data")
    measured = {"random": "same-sources", "unseen": "unseen-sources"}[args.split]
    parts = {"train": train, "held": held, measured: test}
    print({name: len(rows) for name, rows in parts.items()}, flush=True)
    files = {name: write_rows(rows, folder / f"{name}.jsonl") for name, rows in parts.items()}
    data = [f"data.train=[{files['train']}]", f"data.validation=[{files['held']}]"]
    for name, settings in GUARDS.items():
        if not (folder / name / "summary.json").is_file():
            call("train", "guard", *TRAIN, *data, *settings, f"output.dir={folder / name}", "--auto-resume")
    out = ["--report", str(args.out / f"report_{args.split}"), "--hide-prompts"]  # the rows are others': figures alone are ours
    against = ["--against", f"labels alone={folder / 'labels'}"]
    call("evaluate", str(folder / "reasoned"), files[measured], *out, *against, *EXTRAS[args.split])


def random_split(data: Path) -> tuple[list[GuardExample], list[GuardExample], list[GuardExample]]:
    """Training rows, rows to calibrate on, rows to measure on: dev.jsonl."""
    rows = real_rows(data, "train.jsonl")
    train, held = train_and_held(rows)
    return train, held, real_rows(data, "dev.jsonl")


def unseen_split(data: Path) -> tuple[list[GuardExample], list[GuardExample], list[GuardExample]]:
    """As above, and measured on up to ROWS_OF_A_SOURCE rows of each unseen source."""
    rows = real_rows(data, "train.jsonl")
    train, held = train_and_held([row for row in rows if row.source not in UNSEEN_SOURCES])
    by_source = defaultdict(list)
    for row in [*rows, *real_rows(data, "dev.jsonl")]:
        if row.source in UNSEEN_SOURCES:
            by_source[row.source].append(row)
    return train, held, [row for found in by_source.values() for row in drawn(found, ROWS_OF_A_SOURCE)]


def train_and_held(rows: list[GuardExample]) -> tuple[list[GuardExample], list[GuardExample]]:
    """Rows with a reason, as many without, and the starter pairs; apart from them 600 rows to calibrate on."""
    held = balanced_subset([row for row in rows if not row.reason], 600, SEED)
    taken = {row.where for row in held}
    with_reason = [row for row in rows if row.reason]
    without = balanced_subset([row for row in rows if not row.reason and row.where not in taken], len(with_reason), SEED)
    starter = [row for row in load_sources([Source(path="starter")], "guard").examples if isinstance(row, GuardExample)]
    return [*with_reason, *without, *starter], held


def real_rows(data: Path, name: str) -> list[GuardExample]:
    """Rows with their reasons; those whose label was doubted are left out."""
    source = Source(path=str(data / name), reasons=str(data / "reasons.jsonl"), exclude=str(data / "doubts.jsonl"))
    return [row for row in load_sources([source], "guard").examples if isinstance(row, GuardExample)]


def drawn(rows: Iterable[GuardExample], most: int) -> list[GuardExample]:
    """A seeded draw that does not depend on the order of rows."""
    return sorted(rows, key=lambda row: seeded_rank(SEED, row_key(row)))[:most]


def call(*arguments: str) -> None:
    """Run guardtrain as its users do."""
    command = [sys.executable, "-m", "guardtrain", *arguments]
    print(shlex.join(["guardtrain", *arguments]), flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
