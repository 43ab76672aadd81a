"""What a search found, as a file that training reads: `modules.json`; and which model it was found on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from guardtrain.config import ModelConfig
from guardtrain.errors import ConfigError, ModelError
from guardtrain.json_files import read_object
from guardtrain.model.load import loading_errors, resolve
from guardtrain.model.stored import read_entries
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.units import Unit

FORMAT = 2  # 1: drops were of balanced accuracy
KIND = "a modules.json that `guardtrain secure` wrote"
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a tensor: 75 MB of a model of 405 billion weights
# Of config.json, what says nothing of the weights: where it came from, who saved it, how it is run.
UNTOLD = {"_name_or_path", "transformers_version", "use_cache"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """All robust units disturbed at once, measured otherwise than in the search.

    what: "fresh seed", "report" or "out of source". prompts: how many. The probe's figures are means over seeds.
    """

    what: str
    prompts: int
    untouched: ProbeFigures
    disturbed: ProbeFigures

    @property
    def drop(self) -> float:
        """`kept_auroc` that is lost."""
        return self.untouched.kept_auroc - self.disturbed.kept_auroc


@dataclass(frozen=True, kw_only=True)
class RobustModules:
    """The units of a model that can be disturbed together while the probe still tells malicious from benign.

    units: every unit, with the mean drop of `kept_auroc` when it is disturbed alone. robust: those of them that are robust
    together, in the order in which they joined. joint_drop: the drop of all of these, at most `tau`. strength: of the
    perturbation. untouched: the probe on the search prompts of the untouched model. settings: all that the search was given.
    model: as it was named; model_hash: its `fingerprint`. data_hash: of prompts and labels. made: an ISO date.
    """

    units: Mapping[Unit, float]
    robust: tuple[Unit, ...]
    joint_drop: float
    strength: float
    tau: float
    untouched: ProbeFigures
    checks: tuple[Check, ...]
    settings: Mapping[str, Any]
    model: str
    model_hash: str
    data_hash: str
    made: str

    @property
    def rest(self) -> tuple[Unit, ...]:
        """The units that are not robust."""
        robust = set(self.robust)
        return tuple(unit for unit in self.units if unit not in robust)

    @property
    def settings_hash(self) -> str:
        """Of the settings, the same on every machine."""
        return digest_of(dict(self.settings))

    def write(self, path: Path) -> None:
        """Write `modules.json`, whole or not at all. Raises OSError."""
        partial = path.with_name(f".{path.name}.tmp")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> RobustModules:
        """The result in a file. Raises ConfigError for a file that is none, or that was changed."""
        tree = read_object(path, KIND)
        try:
            if tree["format"] != FORMAT:
                raise ConfigError("unknown format", where=str(path), expected=str(FORMAT), found=str(tree["format"]))
            found = cls._from_json(tree)
            problem = next(found._problems(tree["settings_hash"]), None)
        except KeyError as error:
            raise ConfigError("a key is missing", where=str(path), expected=KIND, found=f"no {error.args[0]}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError("not the result of a search", where=str(path), expected=KIND, found=str(error)) from error
        if problem is not None:
            raise ConfigError(problem, where=str(path), expected=KIND)
        return found

    def to_json(self) -> dict[str, Any]:
        """As `write` writes it."""
        return {
            "format": FORMAT,
            "model": self.model,
            "robust": [str(unit) for unit in self.robust],
            "joint_drop": self.joint_drop,
            "strength": self.strength,
            "tau": self.tau,
            "untouched": asdict(self.untouched),
            "checks": [{**asdict(check), "drop": check.drop} for check in self.checks],
            "units": {str(unit): drop for unit, drop in self.units.items()},
            "settings": dict(self.settings),
            "model_hash": self.model_hash,
            "data_hash": self.data_hash,
            "settings_hash": self.settings_hash,
            "made": self.made,
        }

    @classmethod
    def _from_json(cls, tree: dict[str, Any]) -> RobustModules:
        return cls(
            units={Unit.parse(text): float(drop) for text, drop in tree["units"].items()},
            robust=tuple(Unit.parse(text) for text in tree["robust"]),
            joint_drop=float(tree["joint_drop"]),
            strength=float(tree["strength"]),
            tau=float(tree["tau"]),
            untouched=_figures(tree["untouched"]),
            checks=tuple(_check(entry) for entry in tree["checks"]),
            settings=dict(tree["settings"]),
            model=str(tree["model"]),
            model_hash=str(tree["model_hash"]),
            data_hash=str(tree["data_hash"]),
            made=str(tree["made"]),
        )

    def _problems(self, settings_hash: str) -> Iterator[str]:
        """What no search writes."""
        if strangers := sorted(set(self.robust) - set(self.units)):
            yield f"robust names {strangers[0]}, which is not among units"
        if len(set(self.robust)) != len(self.robust):
            yield "robust names a unit twice"
        if not self.robust or not self.rest:
            yield f"{'no' if not self.robust else 'every'} unit is robust"
        if not all(map(math.isfinite, (*self.units.values(), self.joint_drop, self.strength, self.tau))):
            yield "a drop, the strength or tau is not a number"
        if settings_hash != self.settings_hash:
            yield "the settings are not those that were searched with: their hash differs"


def _figures(entry: dict[str, Any]) -> ProbeFigures:
    return ProbeFigures(**{each.name: float(entry[each.name]) for each in fields(ProbeFigures)})


def _check(entry: dict[str, Any]) -> Check:
    untouched, disturbed = _figures(entry["untouched"]), _figures(entry["disturbed"])
    return Check(what=str(entry["what"]), prompts=int(entry["prompts"]), untouched=untouched, disturbed=disturbed)


def digest_of(value: Any) -> str:
    """A hash of plain data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def model_fingerprint(config: ModelConfig) -> str:
    """`fingerprint` of a model argument: a folder, an embedded name, a GGUF file, or an id. Raises ModelError."""
    from transformers.utils import cached_file

    source = resolve(config.name)
    if source.gguf_file is not None:
        path = Path(source.path) / source.gguf_file
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            _sample(file.fileno(), 0, path.stat().st_size, digest)
        return digest.hexdigest()
    if (folder := Path(source.path)).is_dir():
        return fingerprint(folder)
    with loading_errors(config.name, "model"):
        settings = cached_file(source.path, "config.json", revision=config.revision or "main")
    return fingerprint(Path(settings).parent)


def fingerprint(folder: Path) -> str:
    """Which model lies in a folder: the same for the same weights wherever they are and however they are cut into files, another
    after any tuning. Raises ModelError.

    Names, shapes, formats and evenly spaced bytes of every tensor, and what config.json says of the model; not all of the bytes,
    so that 800 GB take seconds. It tells models apart, and is no proof against one who wants to deceive.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(digest_of(_settings(folder)).encode())
    for name, (path, start, entry) in sorted(_tensors(folder).items()):
        first, last = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with path.open("rb") as file:
            _sample(file.fileno(), start + first, last - first, digest)
    return digest.hexdigest()


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = read_object(folder / "config.json", "a model's settings")
    except ConfigError as error:
        raise ModelError("the folder holds no whole model", where=str(folder), found=str(error)) from error
    return {key: value for key, value in settings.items() if key not in UNTOLD}


def _tensors(folder: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """By name: the file, where its numbers begin, and what the header says of the tensor."""
    try:
        index = folder / "model.safetensors.index.json"
        files = (
            sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        )
        found = {}
        for path in (folder / name for name in files):
            start, entries = read_entries(path)
            found.update({name: (path, start, entry) for name, entry in entries.items()})
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise ModelError(
            "the model's weights cannot be read", where=str(folder), expected="safetensors", found=str(error)
        ) from error
    return found


def _sample(descriptor: int, offset: int, size: int, digest: Any) -> None:
    """Feed all of a small stretch of a file, evenly spaced pieces of a large one."""
    digest.update(size.to_bytes(8, "little"))
    if size <= SAMPLES * SAMPLE_BYTES:
        digest.update(os.pread(descriptor, size, offset))
        return
    for sample in range(SAMPLES):
        digest.update(os.pread(descriptor, SAMPLE_BYTES, offset + sample * (size - SAMPLE_BYTES) // (SAMPLES - 1)))
