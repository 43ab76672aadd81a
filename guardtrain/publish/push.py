"""What of a guard's folder goes to the Hub: weights, tokenizer, guard.json, the card; no place on this machine is named."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardtrain.errors import ConfigError
from guardtrain.hub import Contents, Push, check_repository, hub_endpoint
from guardtrain.inference.guards import GUARD_FILE
from guardtrain.publish.card import CARD_FILE, card_of
from guardtrain.publish.facts import ModelFacts, Told, guard_folder, read_facts
from guardtrain.publish.origin import UNKNOWN, obligations

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")
# Whatever else lies there stays: digests of training rows, optimizer states, notes.
BESIDE = (
    *("config.json", "generation_config.json", "adapter_config.json", GUARD_FILE, "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "guard_template.jinja", "serve.sh", "USE.md", "Modelfile", "Modelfile.off"),
)
# Of an earlier version there: weights in other shards or another format would be loaded in place of these.
OUTDATED = (*WEIGHTS, "adapter_config.json", "serve.sh", "USE.md", "Modelfile", "Modelfile.off")
BASE_KEYS = ("base_model", "base_model_name_or_path", "_name_or_path", "name_or_path")


@dataclass(frozen=True, kw_only=True)
class GuardPush:
    """A push of a guard, its card, and what its owner should know before."""

    push: Push
    card: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.push.to_json(), "warnings": list(self.warnings), "card": self.card}


def plan_guard_push(root: Path, repository: str, told: Told, *, is_public: bool) -> GuardPush:
    """What would be pushed; asks nobody. Raises ConfigError for a folder that is no guard, and before a licence is broken."""
    check_repository(repository)
    folder = guard_folder(root)
    facts = read_facts(folder, repository, told)
    if is_public and facts.licence == UNKNOWN:
        hint = "--licence names that of the base model"
        raise ConfigError("no licence", where=facts.base, expected="one, before a model is public", hint=hint)
    card = card_of(facts)
    push = Push(
        kind="model",
        repository=repository,
        is_public=is_public,
        files={CARD_FILE: card.encode(), **_files(folder, facts.base)},
        outdated=OUTDATED,
        message=f"{facts.settings.method} guard of {facts.base}, by guardtrain",
        endpoint=hub_endpoint(),
    )
    return GuardPush(push=push, card=card, warnings=tuple(_warnings(facts)))


def _warnings(facts: ModelFacts) -> list[str]:
    found = obligations(facts.licence, facts.repository)
    found += ["the guard is not calibrated"] * (facts.settings.calibration is None)
    found += ["nothing was measured that the card could show: --report"] * (facts.evidence is None)
    found += [f"the training data are not on the Hub: {', '.join(facts.sources)}; --dataset OWNER/NAME links a data card"] * bool(
        facts.sources and not facts.data_sets
    )
    return found


def _files(folder: Path, base: str) -> dict[str, Contents]:
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    weights = [name for name in paths if any(fnmatch.fnmatchcase(name, pattern) for pattern in WEIGHTS)]
    if not weights:
        raise ConfigError("no weights", where=str(folder), expected="safetensors or a GGUF file")
    beside = [name for name in BESIDE if name in paths]
    return {**{name: _shareable(paths[name], base) for name in beside}, **{name: paths[name] for name in weights}}


def _shareable(path: Path, base: str) -> Contents:
    """The file, or its text with the base model's public name where it names a folder, and data files without theirs."""
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json"):
        return path
    tree = json.loads(path.read_text(encoding="utf-8"))
    changed = _without_places(tree, base)
    return path if changed == tree else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _without_places(tree: Mapping[str, Any], base: str) -> dict[str, Any]:
    changed = {key: base if key in BASE_KEYS and _is_place(value) else value for key, value in tree.items()}
    calibration = tree.get("calibration")
    if isinstance(calibration, dict):
        changed["calibration"] = {**calibration, "data": [Path(name).name for name in calibration["data"]]}
    return changed


def _is_place(value: object) -> bool:
    return isinstance(value, str) and (value.startswith(("/", ".", "~")) or Path(value).exists())
