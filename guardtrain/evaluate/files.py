"""`guardtrain evaluate`: a model argument and data files to figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Console

from guardtrain.config import Source
from guardtrain.data.checks import over_budget
from guardtrain.data.problems import Problem, errors_of
from guardtrain.data.sources import load_sources
from guardtrain.data.splits import balanced_subset
from guardtrain.errors import ConfigError, DataError
from guardtrain.evaluate.report import evaluate_shown
from guardtrain.evaluate.runner import Evaluation, EvaluationMode, scores_of
from guardtrain.inference.guards import Guard, load_guard
from guardtrain.types import GuardExample, Label


@dataclass(frozen=True)
class FileEvaluation:
    """An evaluation with where it came from."""

    model: str
    data: Sequence[str]
    guard: Guard
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Figures overall, and by source the flagged fraction of each class at the guard's threshold."""
        return {
            "model": self.model,
            "data": list(self.data),
            "is_trained": self.guard.is_trained,
            "thresholds": self.guard.settings.thresholds,
            **self.evaluation.to_json(),
            "flagged_by_source": flagged_by_source(self.evaluation),
        }


def parse_modes(text: str) -> list[EvaluationMode]:
    """Modes from a comma-separated list. Raises ConfigError."""
    known = get_args(EvaluationMode)
    modes = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [mode for mode in modes if mode not in known]
    if unknown or not modes or len(set(modes)) < len(modes):
        raise ConfigError("not a list of modes", where="--modes", expected="some of off,on,both", found=text)
    return modes  # type: ignore[return-value]  # each was compared with the literal's members


def evaluate_files(
    model: str,
    data: Sequence[str],
    modes: Sequence[EvaluationMode] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    max_prompt_tokens: int | None = None,
    policy: str | None = None,
    console: Console,
) -> FileEvaluation:
    """Score every row of `data` with the guard `model`.

    modes: those that the guard was trained in if absent, and their mean. columns, labels: as in a recipe's source, for each
    of `data`. max_prompt_tokens: replaces the guard's own limit.
    Raises DataError for any row that cannot be scored: none is dropped.
    """
    sources = [Source(path=path, columns=dict(columns or {}), labels=dict(labels or {})) for path in data]
    loaded = load_sources(sources, "guard")
    _refuse(errors_of(loaded.problems))
    examples = [example for example in loaded.examples if isinstance(example, GuardExample)]
    if {example.label for example in examples} != set(Label):
        raise DataError("the measures need both classes", where=", ".join(data), found=f"{len(examples)} rows of one class")
    if max_rows is not None:
        examples = balanced_subset(examples, max_rows, seed=0)
    guard = load_guard(model, policy=policy)
    limit = max_prompt_tokens or guard.settings.max_prompt_tokens
    _refuse(over_budget(examples, limit, lambda text: len(guard.template.encoder.plain(text))), hint="--max-prompt-tokens")
    modes = modes or _trained_modes(guard)
    scorer, thresholds = guard.scorer(pack_tokens=2048), guard.settings.thresholds
    evaluation = evaluate_shown("score", scorer, examples, modes, thresholds=thresholds, console=console)
    return FileEvaluation(model, data, guard, evaluation)


def _trained_modes(guard: Guard) -> list[EvaluationMode]:
    return parse_modes(",".join([*guard.settings.modes, *(["both"] if len(guard.settings.modes) > 1 else [])]))


def _refuse(errors: Sequence[Problem], hint: str | None = None) -> None:
    if errors:
        more = f"; and {len(errors) - 1} more problems" if len(errors) > 1 else ""
        raise DataError(f"{errors[0].cause}: {errors[0].what}{more}", where=errors[0].where, hint=hint)


def flagged_by_source(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """By mode, source and label: rows, and the fraction flagged at the mode's threshold."""
    result: dict[str, dict[str, Any]] = {}
    for mode, measures in evaluation.measures.items():
        flags: dict[str, list[bool]] = defaultdict(list)
        for example, score in zip(evaluation.examples, scores_of(evaluation.scored, mode), strict=True):
            flags[f"{example.source}/{example.label}"].append(bool(score >= measures.threshold))
        result[mode] = {
            key: {"rows": len(values), "flagged": round(sum(values) / len(values), 4)} for key, values in sorted(flags.items())
        }
    return result
