"""What is true of a guard that is to be published: read from its folder, from its run, and from a report on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guardtrain.config import Recipe
from guardtrain.errors import ConfigError
from guardtrain.evaluate.bootstrap import rate_interval
from guardtrain.evaluate.scores import Measures
from guardtrain.inference.guards import GuardSettings, model_folder
from guardtrain.json_files import read_object
from guardtrain.overrides import load_recipe
from guardtrain.publish.origin import data_sets, licence_of, public_base

REPORT_FILE = "report.json"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True)
class SetFigures:
    """How the guard did on one set. modes: and controls, by name. contaminated: rows left out, None where nobody looked."""

    name: str
    modes: Mapping[str, Measures]
    contaminated: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Figures and where they were read.

    is_held_out: the run's own held-out rows, on which its thresholds were set. evaded: attacks that got through and how many were
    tried, by how prompts were read.
    """

    origin: str
    is_held_out: bool
    sets: tuple[SetFigures, ...]
    notes: tuple[str, ...] = ()
    evaded: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A guard in facts. No path of this machine is in them.

    base, licence: of the base model. kind: merged, adapter or gguf. data_sets: ids on the Hub; sources: names of other data.
    """

    repository: str
    kind: str
    base: str
    licence: str
    settings: GuardSettings
    recipe: Recipe | None
    summary: Mapping[str, Any]
    data_sets: Sequence[str]
    sources: Sequence[str]
    evidence: Evidence | None


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the user says of a guard, and which report speaks of it."""

    base: str | None = None
    licence: str | None = None
    data_sets: tuple[str, ...] = ()
    report: Path | None = None


def guard_folder(folder: Path) -> Path:
    """The folder with the weights of a run, a model or an export. Raises ConfigError."""
    found = model_folder(str(folder))
    if found is None:
        raise ConfigError("no guard", where=str(folder), expected="a run or an export of one, with guard.json")
    return found


def read_facts(folder: Path, repository: str, told: Told) -> ModelFacts:
    """Raises ConfigError for a folder or report that does not hold what is needed, ModelError for a broken guard.json."""
    settings = GuardSettings.read(folder)
    run = _run_of(folder)
    recipe = load_recipe(str(run / "recipe.yaml")) if run else None
    summary = read_object(run / SUMMARY_FILE, "the summary of a run") if run and (run / SUMMARY_FILE).is_file() else {}
    base = public_base(settings.base_model, told.base)
    public, other = data_sets(recipe, told.data_sets)
    return ModelFacts(
        repository=repository,
        kind=_kind(folder),
        base=base,
        licence=licence_of(base, told.licence),
        settings=_without_places(settings),
        recipe=recipe,
        summary=summary,
        data_sets=public,
        sources=other,
        evidence=_of_report(told.report, settings) if told.report else _of_summary(summary),
    )


def _without_places(settings: GuardSettings) -> GuardSettings:
    """Files that it was calibrated on by their names alone."""
    if settings.calibration is None:
        return settings
    data = tuple(Path(name).name for name in settings.calibration.data)
    return replace(settings, calibration=replace(settings.calibration, data=data))


def _run_of(folder: Path) -> Path | None:
    """The run that a model folder, or an export in its usual place, belongs to."""
    return next((each for each in list(folder.resolve().parents)[:2] if (each / "recipe.yaml").is_file()), None)


def _kind(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    return "merged" if any(folder.glob("*.safetensors")) else "gguf"


def _of_report(folder: Path, settings: GuardSettings) -> Evidence:
    path = folder / REPORT_FILE if folder.is_dir() else folder
    tree = read_object(path, "a report of `guardtrain evaluate --report`")
    try:
        calibration = settings.calibration.to_json() if settings.calibration else None
        if tree["policy"] != settings.policy or tree["calibration"] != json.loads(json.dumps(calibration)):
            found = "another policy or calibration"
            raise ConfigError("the report is of another guard", where=str(path), expected="what guard.json says", found=found)
        return Evidence(
            origin=REPORT_FILE,
            is_held_out=False,
            sets=tuple(_set_figures(each) for each in tree["sets"]),
            notes=tuple(tree["notes"]),
            evaded=_evaded(tree["attacks"] or []),
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ConfigError("not a report", where=str(path), expected="report.json of guardtrain", found=str(error)) from error


def _evaded(table: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Of all attacks together, without chunks."""
    found = {}
    for each in table:
        if not each["chunk"]:
            rate = each["evasion"]["all"]["evaded"]
            found["normalised" if each["normalise"] else "as they are"] = (rate["count"], rate["of"])
    return found


def _set_figures(tree: Mapping[str, Any]) -> SetFigures:
    modes = {name: _measures(each) for name, each in {**tree["modes"], **tree["controls"]}.items()}
    return SetFigures(name=tree["name"], modes=modes, contaminated=len(tree["contaminated"]), warnings=tuple(tree["warnings"]))


def _of_summary(summary: Mapping[str, Any]) -> Evidence | None:
    held_out = summary.get("held_out")
    if not held_out:
        return None
    modes = {name: _measures(each) for name, each in held_out["modes"].items()}
    return Evidence(origin=SUMMARY_FILE, is_held_out=True, sets=(SetFigures(name="the run's held-out rows", modes=modes),))


def _measures(tree: Mapping[str, Any]) -> Measures:
    """With the intervals of the two rates at the threshold, which follow from counts, where none were drawn."""
    intervals = {key: (low, high) for key, (low, high) in tree["intervals"].items()}
    measures = Measures(**{**tree, "intervals": intervals})
    for key, rows in (("recall", measures.malicious), ("false_positive_rate", measures.benign)):
        value = getattr(measures, key)
        if key not in intervals and value is not None and rows:
            intervals[key] = rate_interval(round(value * rows), rows)
    return measures
