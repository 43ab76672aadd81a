"""`guardtrain data push`: what of a data set folder goes to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from guardtrain.errors import ConfigError
from guardtrain.hub import Push, card_header, check_repository, hub_endpoint
from guardtrain.prepare.assign import SPLITS
from guardtrain.prepare.build import CARD_FILE, REPORT_FILE

# Nothing else of the folder: rejected rows may stand in benchmarks whose licence forbids to publish them.
DATA_FILES = tuple(f"{split}.{kind}" for split in SPLITS for kind in ("parquet", "jsonl"))


def plan_push(folder: Path, repository: str, *, is_public: bool) -> Push:
    """What would be pushed; asks nobody. Raises ConfigError for a folder that is no data set, or one without a licence.

    Data files of an earlier version that this one has not are deleted: a row that was tested on may be trained on now.
    """
    check_repository(repository)
    names = [name for name in (CARD_FILE, REPORT_FILE, *DATA_FILES) if (folder / name).is_file()]
    if CARD_FILE not in names or not set(names) & set(DATA_FILES):
        expected = "a folder that `guardtrain data build` wrote, with its card and rows"
        raise ConfigError("no data set", where=str(folder), expected=expected)
    card = folder / CARD_FILE
    licence = card_header(card.read_text(encoding="utf-8"), str(card)).get("license")
    if is_public and licence in (None, "unknown"):
        raise ConfigError("no licence", where=str(card), expected="one, before a data set is public")
    return Push(
        kind="dataset",
        repository=repository,
        is_public=is_public,
        files={name: folder / name for name in names},
        outdated=DATA_FILES,
        message=f"{folder.resolve().name}, built by guardtrain",
        endpoint=hub_endpoint(),
    )
