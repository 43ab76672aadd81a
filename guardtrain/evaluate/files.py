"""`guardtrain evaluate`: a model argument and data files to figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Console
from rich.progress import Progress

from guardtrain.config import Source
from guardtrain.data.checks import over_budget
from guardtrain.data.problems import Problem, errors_of
from guardtrain.data.sources import load_sources
from guardtrain.data.splits import balanced_subset
from guardtrain.distributed.ranks import join, launched, leave, main_first, together
from guardtrain.errors import ConfigError, DataError
from guardtrain.evaluate.runner import Evaluation, EvaluationMode, evaluate, needs_calibration
from guardtrain.evaluate.shared import SharedScorer
from guardtrain.inference.cascade import Cascade
from guardtrain.inference.guards import LoadedGuard, load_guard
from guardtrain.types import GuardExample

# Prompts of one batch; ranks wait this long for each other, the last one for all that the slowest has left to score.
PACK_TOKENS = 2048
RANKS_TIMEOUT_SECONDS = 7200.0


@dataclass(frozen=True)
class FileEvaluation:
    """An evaluation with where it came from."""

    model: str
    data: Sequence[str]
    guard: LoadedGuard
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
    """Modes from a comma-separated list. Raises ConfigError, which one rank prints."""
    known = get_args(EvaluationMode)
    modes = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [mode for mode in modes if mode not in known]
    if unknown or not modes or len(set(modes)) < len(modes):
        error = ConfigError("not a list of modes", where="--modes", expected=f"some of {','.join(known)}", found=text)
        error.is_said = not launched().is_main
        raise error
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
    """Score every row of `data` with the guard `model`, on all ranks that a launcher started.

    modes: if absent those that the guard was trained in, their mean, and the cascade where the guard has a band for it.
    columns, labels: as in a recipe's source, for each of `data`. max_prompt_tokens: replaces the guard's own limit.
    It returns on the main rank alone, which measures, prints and writes: any other process ends here once its rows are scored.
    Raises DataError for any row that cannot be scored: none is dropped. Where one rank raises, all do.
    """
    ranks = join(timeout_seconds=RANKS_TIMEOUT_SECONDS)
    examples = together(lambda: read_rows(data, columns or {}, labels or {}, max_rows))
    guard = main_first(lambda: load_guard(model, policy=policy))
    modes, cascade = together(lambda: check_guard(guard, examples, modes, max_prompt_tokens))
    scorer = SharedScorer(guard.scorer(pack_tokens=PACK_TOKENS), ranks)
    with Progress(console=console, transient=True, disable=not ranks.is_main) as progress:
        task = progress.add_task("score", total=len(examples))
        evaluation = evaluate(
            scorer,
            examples,
            modes,
            calibration=guard.settings.calibration,
            cascade=cascade,
            on_row=lambda: progress.advance(task),
        )
    leave()
    if not ranks.is_main:
        raise SystemExit(0)
    return FileEvaluation(model, data, guard, evaluation)


def read_rows(
    data: Sequence[str], columns: Mapping[str, str], labels: Mapping[str, str], max_rows: int | None = None
) -> list[GuardExample]:
    """All rows of labelled files, or a balanced draw of them. Raises DataError for any row that cannot be read."""
    sources = [Source(path=path, columns=dict(columns), labels=dict(labels)) for path in data]
    loaded = load_sources(sources, "guard")
    _refuse(errors_of(loaded.problems))
    examples = [example for example in loaded.examples if isinstance(example, GuardExample)]
    return balanced_subset(examples, max_rows, seed=0) if max_rows is not None else examples


def check_guard(
    guard: LoadedGuard, examples: Sequence[GuardExample], modes: Sequence[EvaluationMode] | None, max_prompt_tokens: int | None
) -> tuple[list[EvaluationMode], Cascade | None]:
    """The modes to measure, by default all that the guard can, and its band. Raises for what it cannot score."""
    limit = max_prompt_tokens or guard.settings.max_prompt_tokens
    _refuse(over_budget(examples, limit, lambda text: len(guard.template.encoder.plain(text))), hint="--max-prompt-tokens")
    cascade = Cascade(*guard.settings.cascade) if guard.settings.cascade else None
    chosen = list(modes) if modes else _default_modes(guard, cascade)
    if "cascade" in chosen and cascade is None:
        raise needs_calibration("--modes")
    return chosen, cascade


def _default_modes(guard: LoadedGuard, cascade: Cascade | None) -> list[EvaluationMode]:
    trained = parse_modes(",".join(guard.settings.modes))
    if len(trained) == 1:
        return trained
    return [*trained, "both", "cascade"] if cascade else [*trained, "both"]


def _refuse(errors: Sequence[Problem], hint: str | None = None) -> None:
    if errors:
        more = f"; and {len(errors) - 1} more problems" if len(errors) > 1 else ""
        raise DataError(f"{errors[0].cause}: {errors[0].what}{more}", where=errors[0].where, hint=hint)


def flagged_by_source(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """By mode, source and label: rows, and the fraction flagged at the mode's threshold."""
    result: dict[str, dict[str, Any]] = {}
    for mode, measures in evaluation.measures.items():
        flags: dict[str, list[bool]] = defaultdict(list)
        for example, score in zip(evaluation.examples, evaluation.scores(mode), strict=True):
            flags[f"{example.source}/{example.label}"].append(bool(score >= measures.threshold))
        result[mode] = {
            key: {"rows": len(values), "flagged": round(sum(values) / len(values), 4)} for key, values in sorted(flags.items())
        }
    return result
