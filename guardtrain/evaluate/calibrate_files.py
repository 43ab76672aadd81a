"""`guardtrain calibrate`: thresholds and probabilities for a trained guard, from labelled rows or from none."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from guardtrain.data.hashes import RowHashes
from guardtrain.data.keys import prompt_texts
from guardtrain.errors import ConfigError, DataError
from guardtrain.evaluate.calibration import CONTENT_FREE, calibrate_guard, calibrate_without_rows
from guardtrain.evaluate.files import evaluate_files, parse_modes, read_rows
from guardtrain.evaluate.runner import EvaluationMode, scores_of
from guardtrain.inference.calibration import Calibration
from guardtrain.inference.guards import GuardSettings, load_guard, model_folder
from guardtrain.types import GuardExample, Mode

log = logging.getLogger(__name__)

UNKNOWN_TRAINING = "it is not known whether these rows were trained on: the guard has no digests of its training rows"


def calibrate_files(
    model: str,
    data: Sequence[str],
    target_fpr: float,
    *,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    max_prompt_tokens: int | None = None,
    console: Console,
) -> GuardSettings:
    """Calibrate a guard in every mode that it was trained in, and write guard.json.

    It returns on the main rank alone, as `evaluate_files` does. Raises ConfigError for a model that is no trained guard, and
    DataError for rows that it was trained on.
    """
    folder = guard_folder(model)
    unknown = refuse_training_rows(folder, read_rows(data, columns or {}, labels or {}))
    modes = modes_to_calibrate(GuardSettings.read(folder))
    result = evaluate_files(
        model, data, modes, columns=columns, labels=labels, max_prompt_tokens=max_prompt_tokens, console=console
    )
    settings = calibrate_guard(result.guard.settings, result.evaluation, target_fpr, [Path(name).name for name in data])
    if unknown and settings.calibration:
        warnings = (*settings.calibration.warnings, unknown)
        settings = dataclasses.replace(settings, calibration=dataclasses.replace(settings.calibration, warnings=warnings))
    settings.write(folder)
    return settings


def calibrate_contextually(model: str) -> GuardSettings:
    """Calibrate a guard without data, from what it says of texts that say nothing, and write guard.json. Raises ConfigError."""
    folder = guard_folder(model)
    guard = load_guard(model)
    scored = dict(guard.scorer().score(CONTENT_FREE, [Mode(mode) for mode in guard.settings.modes]))
    rows = [scored[index] for index in range(len(CONTENT_FREE))]
    scores = {str(mode): scores_of(rows, mode) for mode in modes_to_calibrate(guard.settings)}
    settings = dataclasses.replace(guard.settings, calibration=calibrate_without_rows(scores), cascade=None)
    settings.write(folder)
    return settings


def guard_folder(model: str) -> Path:
    """The folder of a trained guard, whose guard.json is written. Raises ConfigError for any other model."""
    folder = model_folder(model)
    if folder is None:
        raise ConfigError("only a trained guard can be calibrated", where=model, expected="a run or model folder with guard.json")
    return folder


def refuse_training_rows(folder: Path, examples: Sequence[GuardExample]) -> str | None:
    """Raise DataError where a row was trained on; what to say where that cannot be known."""
    try:
        known = RowHashes.read(folder)
    except DataError as error:
        log.warning("%s", error)
        return UNKNOWN_TRAINING
    seen = np.flatnonzero(known.contains(prompt_texts(examples)))
    if len(seen):
        found = f"{len(seen)} of {len(examples)} rows"
        where, hint = examples[seen[0]].where, "on rows that a guard knows by heart its thresholds would be too sure"
        raise DataError("the guard was trained on this row", where=where, expected="held-out rows", found=found, hint=hint)
    return None


def modes_to_calibrate(settings: GuardSettings) -> list[EvaluationMode]:
    """Those that the guard was trained in, and their mean."""
    return parse_modes(",".join([*settings.modes, *(["both"] if len(settings.modes) > 1 else [])]))


def calibration_table(calibration: Calibration) -> Table:
    """One line for each mode."""
    table = Table(title=calibration.said(), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("mode")
    for heading in ("temperature", "bias", "threshold", "95 %", "false alarms there", "95 % "):
        table.add_column(heading, justify="right")
    for mode, each in calibration.modes.items():
        rate = "–" if each.fpr is None else f"{each.fpr:.2%}"
        cells = [f"{each.temperature:.2f}", f"{each.bias:+.2f}", f"{each.threshold:.2f}"]
        table.add_row(mode, *cells, _ends(each.threshold_interval, ".2f"), rate, _ends(each.fpr_interval, ".1%"))
    return table


def _ends(interval: tuple[float, float] | None, spec: str) -> str:
    return "–" if interval is None else f"{interval[0]:{spec}} to {interval[1]:{spec}}"
