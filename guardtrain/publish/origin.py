"""Where a published guard comes from: the base model by its public name, its licence, and the data sets it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guardtrain.config import Recipe
from guardtrain.errors import ConfigError
from guardtrain.hub import REPOSITORY
from guardtrain.model.load import EMBEDDED_HUB_ID, EMBEDDED_MODEL

UNKNOWN = "unknown"
# As their cards said in November 2026, for the models of shipped recipes; of any other the licence is to be named.
LICENCES = {
    "HuggingFaceTB/SmolLM2-": "apache-2.0",
    "Qwen/Qwen3-": "apache-2.0",
    "meta-llama/Llama-3.1-": "llama3.1",
    "meta-llama/Meta-Llama-3.1-": "llama3.1",
}
OWN_PAIRS = {"starter": "starter (pairs written for guardtrain)", "starter-hard": "starter-hard (pairs written for guardtrain)"}
DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet"}


def public_base(name: str, given: str | None) -> str:
    """The id on the Hub of the base model. given: what the user says it is. Raises ConfigError where nobody can know.

    A guard that was trained from a folder names that folder, which means nothing elsewhere and says where it lay.
    """
    if given is not None:
        if not REPOSITORY.fullmatch(given):
            raise ConfigError("not the id of a model", where="--base-model", expected="OWNER/NAME", found=given)
        return given
    if name == EMBEDDED_MODEL:
        return EMBEDDED_HUB_ID
    if is_local(name):
        raise ConfigError(
            "the base model is a folder of this machine", where="guard.json", hint="name it: --base-model OWNER/NAME"
        )
    return name


def licence_of(base: str, given: str | None) -> str:
    """An SPDX identifier, or one of the Hub's own, in small letters; `unknown` where nobody said."""
    if given:
        return given.lower()
    return next((licence for start, licence in LICENCES.items() if base.startswith(start)), UNKNOWN)


def obligations(licence: str, repository: str) -> list[str]:
    """What a licence asks of who passes the model on; for the licences that shipped recipes meet."""
    if not licence.startswith("llama"):
        return []
    found = ["Built with Llama. Its licence asks for a copy of it and its notice beside the model."]
    if not repository.partition("/")[2].lower().startswith("llama"):
        found.append('Its licence asks that the model\'s name begin with "Llama".')
    return found


def data_sets(recipe: Recipe | None, given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Ids of data sets on the Hub, and the names of all other sources: a file's name, not where it lies."""
    for each in given:
        if not REPOSITORY.fullmatch(each):
            raise ConfigError("not the id of a data set", where="--dataset", expected="OWNER/NAME", found=each)
    paths = [source.path for source in recipe.data.train] if recipe else []
    public = [path for path in paths if path not in OWN_PAIRS and not is_local(path)]
    other = [OWN_PAIRS.get(path, Path(path).name) for path in paths if path not in public]
    return list(dict.fromkeys([*given, *public])), list(dict.fromkeys(other))


def is_local(name: str) -> bool:
    """Whether a model or data argument means something on this machine alone."""
    path = Path(name).expanduser()
    return name.startswith((".", "/", "~")) or path.suffix in DATA_SUFFIXES or path.exists() or not REPOSITORY.fullmatch(name)
