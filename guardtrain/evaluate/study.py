"""`guardtrain evaluate --report`: a guard on several sets, beside its controls, put together for a report.

Rows are scored on all ranks that a launcher started; what follows (times, attacks, figures) is the main rank's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from guardtrain.config import EvaluateConfig
from guardtrain.data.hashes import RowHashes
from guardtrain.data.keys import prompt_texts, seeded_rank
from guardtrain.distributed.ranks import join, launched, leave, main_first, together
from guardtrain.environment import describe_environment
from guardtrain.errors import ConfigError, DataError, GuardtrainError
from guardtrain.evaluate.attacks import attack_table, load_attacks
from guardtrain.evaluate.baseline import tfidf_scores
from guardtrain.evaluate.benchmarks import BENCHMARKS, read_benchmark
from guardtrain.evaluate.calibration import calibrate_mode, hash_of_rows
from guardtrain.evaluate.contamination import Contamination, clean_rows, find_contaminated
from guardtrain.evaluate.files import PACK_TOKENS, RANKS_TIMEOUT_SECONDS, check_guard, read_rows
from guardtrain.evaluate.reporting.data import Contaminated, Report, SetReport, Speed
from guardtrain.evaluate.runner import Evaluation, EvaluationMode, evaluate
from guardtrain.evaluate.scores import Judged, flip_rate
from guardtrain.evaluate.shared import SharedScorer
from guardtrain.evaluate.speed import measure_latency, measure_throughput
from guardtrain.inference.cascade import Cascade
from guardtrain.inference.chunks import PromptScorer
from guardtrain.inference.defences import RememberingScorer, defended_scorer
from guardtrain.inference.guards import LoadedGuard, load_guard, model_folder
from guardtrain.overrides import load_recipe
from guardtrain.train.rows import load_rows, measured_rows
from guardtrain.types import GuardExample, Label, Mode

log = logging.getLogger(__name__)

CHUNK_TOKENS = 256
TFIDF = "TF-IDF + logistic regression"
WITHOUT_ROWS = "copies of training rows are found by exact digests alone, and TF-IDF has nothing to learn from"
OTHER_POLICY = "the policy is not the guard's own: it was neither trained nor calibrated under it"
NO_LABEL_ONLY = "no guard of labels alone was given to compare with (--against; `guardtrain ladder` trains one)"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is to be measured.

    data: benchmark names, NAME=PATH of a benchmark's copy, or labelled files; each is a set of its own.
    against: other guards by the name they get in the report. timed_rows, sampled_rows: how many rows are timed one by one, and
    get `samples` reasons drawn; 0 for none. command: as it was typed.
    """

    model: str
    data: Sequence[str]
    modes: Sequence[EvaluationMode] | None = None
    against: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    max_rows: int | None = None
    max_prompt_tokens: int | None = None
    policy: str | None = None
    timed_rows: int = 24
    sampled_rows: int = 0
    samples: int = 5
    with_attacks: bool = False
    command: str = ""


@dataclass(frozen=True)
class DataSet:
    """The rows of one set. contaminated: those of `all_rows` that stand in the training data; `examples` are the others."""

    name: str
    axis: Any
    licence: str
    note: str
    all_rows: list[GuardExample]
    contaminated: list[Contamination] = field(default_factory=list)

    @property
    def examples(self) -> list[GuardExample]:
        """The rows of the headline."""
        return clean_rows(self.all_rows, self.contaminated)


@dataclass(frozen=True)
class TrainingRows:
    """What the run of a guard learnt from, read again. held_out: the rows that its thresholds were first chosen on."""

    train: list[GuardExample]
    held_out: list[GuardExample]


def run_study(study: Study, *, console: Console) -> Report:
    """Score everything and put the report together. It returns on the main rank alone; any other process ends here.

    Raises a GuardtrainError for rows, benchmarks or models that cannot be used; where one rank raises, all do.
    """
    start = time.perf_counter()
    if study.with_attacks and study.modes == ["cascade"]:
        raise ConfigError("attacks are scored in one mode", where="--attacks", expected="mode off, on or both", found="cascade")
    ranks = join(timeout_seconds=RANKS_TIMEOUT_SECONDS)
    sets = together(lambda: [read_set(argument, study) for argument in _distinct(study.data)])
    guard = main_first(lambda: load_guard(study.model, policy=study.policy))
    training, why_none = together(lambda: training_rows(study.model, guard))
    notes = [why_none] if why_none else []
    notes += [OTHER_POLICY] if study.policy is not None and guard.is_trained else []
    sets = [_without_contaminated(each, study.model, training, notes) for each in sets]
    modes, cascade = together(lambda: check_guard(guard, _all(sets), study.modes, study.max_prompt_tokens))
    evaluations = _score(guard, sets, modes, cascade, console)
    others = {name: _headline(name, model, sets, study, console) for name, model in study.against.items()}
    leave()
    if not ranks.is_main:
        raise SystemExit(0)
    notes += [] if others else [NO_LABEL_ONLY]
    reports = [
        _set_report(each, evaluation, guard, _controls(number, each, training, guard, others))
        for number, (each, evaluation) in enumerate(zip(sets, evaluations, strict=True))
    ]
    mode = headline_mode(modes)
    return Report(
        model=study.model,
        base_model=guard.settings.base_model,
        method=guard.settings.method,
        policy=guard.settings.policy,
        mode=mode,
        sets=reports,
        calibration=guard.settings.calibration,
        speed=_speed(guard, sets, modes, cascade, study.timed_rows),
        escalation_rate=_escalation_rate(evaluations),
        flip_rate=_flip_rate(guard, sets, study),
        attacks=_attacks(guard, mode, console) if study.with_attacks else None,
        environment=describe_environment(),
        command=study.command,
        seconds=time.perf_counter() - start,
        training_rows=len(training.train) if training else None,
        notes=notes,
    )


def read_set(argument: str, study: Study) -> DataSet:
    """A benchmark, or a labelled file. Raises ConfigError, DataError."""
    name = argument.partition("=")[0]
    if name not in BENCHMARKS:
        rows = read_rows([argument], study.columns, study.labels, study.max_rows)
        return DataSet(Path(argument).name, "mixed", "", "", rows)
    found = read_benchmark(argument)
    left_out = [f"{count} rows left out: {why}" for why, count in found.left_out.items()]
    rows = found.examples if study.max_rows is None else _drawn(found.examples, study.max_rows)
    benchmark = found.benchmark
    return DataSet(name, benchmark.axis, benchmark.licence, "; ".join([*benchmark.caveats, *left_out]), rows)


def training_rows(model: str, guard: LoadedGuard) -> tuple[TrainingRows | None, str | None]:
    """The rows of the run that a guard is from, or why there are none."""
    folder = model_folder(model)
    if folder is None:
        return None, None  # never trained here
    saved = folder.parent / "recipe.yaml"
    if not saved.is_file():
        return None, f"the guard is not in its run's folder: {WITHOUT_ROWS}"
    try:
        recipe = load_recipe(str(saved))
        rows = load_rows(recipe, guard.template)
    except GuardtrainError as error:
        return None, f"the run's rows cannot be read again ({error}): {WITHOUT_ROWS}"
    train = [row for row in rows.train if isinstance(row, GuardExample)]
    return TrainingRows(train, measured_rows(rows, recipe.evaluate.max_rows, seed=recipe.data.seed)), None


def headline_mode(modes: Sequence[EvaluationMode]) -> EvaluationMode:
    """The mode that the guard will run in: the last, the cascade only where there is no other."""
    return sorted(modes, key=lambda mode: mode != "cascade")[-1]


def _distinct(data: Sequence[str]) -> Sequence[str]:
    if len(set(data)) < len(data):
        raise ConfigError("a set is named twice", where="DATA", found=", ".join(data))
    return data


def _without_contaminated(each: DataSet, model: str, training: TrainingRows | None, notes: list[str]) -> DataSet:
    texts = prompt_texts(each.all_rows)
    found = find_contaminated(texts, prompt_texts(training.train)) if training else _by_digest(texts, model)
    if len(found) == len(texts):
        notes.append(f"{each.name}: every row stands in the training data; its figures say nothing of new rows")
        return each
    return DataSet(each.name, each.axis, each.licence, each.note, each.all_rows, found)


def _by_digest(texts: list[str], model: str) -> list[Contamination]:
    folder = model_folder(model)
    try:
        is_known_N = RowHashes.read(folder).contains(texts) if folder else np.zeros(len(texts), dtype=bool)
    except DataError as error:
        log.warning("%s", error)
        return []
    return [Contamination(index, "exact", -1, 1.0) for index in np.flatnonzero(is_known_N).tolist()]


def _score(
    guard: LoadedGuard, sets: Sequence[DataSet], modes: Sequence[EvaluationMode], cascade: Cascade | None, console: Console
) -> list[Evaluation]:
    scorer, calibration = SharedScorer(guard.scorer(pack_tokens=PACK_TOKENS), launched()), guard.settings.calibration
    with Progress(console=console, transient=True, disable=not launched().is_main) as progress:
        bars = [_bar(progress, each.name, len(each.examples)) for each in sets]
        return [
            evaluate(scorer, each.examples, modes, calibration=calibration, cascade=cascade, on_row=bar)
            for each, bar in zip(sets, bars, strict=True)
        ]


def _bar(progress: Progress, title: str, rows: int) -> Callable[[], None]:
    task = progress.add_task(title, total=rows)
    return lambda: progress.advance(task)


def _headline(name: str, model: str, sets: Sequence[DataSet], study: Study, console: Console) -> list[Judged]:
    """Another guard on the same rows, in the mode that it would run in."""
    other = main_first(lambda: load_guard(model, policy=study.policy))
    modes, _ = together(lambda: check_guard(other, _all(sets), None, study.max_prompt_tokens))
    mode = headline_mode(modes)
    log.info("%s is %s in mode %s", name, model, mode)
    return [evaluation.judged(mode) for evaluation in _score(other, sets, [mode], None, console)]


def _set_report(each: DataSet, evaluation: Evaluation, guard: LoadedGuard, controls: Mapping[str, Judged]) -> SetReport:
    calibration = guard.settings.calibration
    return SetReport(
        name=each.name,
        axis=each.axis,
        licence=each.licence,
        note=each.note,
        examples=each.examples,
        judged={mode: evaluation.judged(mode) for mode in evaluation.measures},
        controls=controls,
        reasons=[row.reason for row in evaluation.scored],
        contaminated=[Contaminated(_name_of(each.all_rows[row.index]), row.kind, row.similarity) for row in each.contaminated],
        is_calibration_set=calibration is not None and calibration.data_hash == hash_of_rows(each.all_rows),
    )


def _controls(
    number: int, each: DataSet, training: TrainingRows | None, guard: LoadedGuard, others: Mapping[str, list[Judged]]
) -> dict[str, Judged]:
    found = {name: judged[number] for name, judged in others.items()}
    if training is not None:
        found[TFIDF] = _tfidf(training, each.examples, guard)
    return found


def _tfidf(training: TrainingRows, examples: Sequence[GuardExample], guard: LoadedGuard) -> Judged:
    """The baseline on the run's own training rows, its threshold at the guard's rate on the run's held-out rows."""
    held_N, scores_N = np.split(tfidf_scores(training.train, [*training.held_out, *examples]), [len(training.held_out)])
    target = (guard.settings.calibration.target_fpr if guard.settings.calibration else None) or EvaluateConfig().target_fpr
    mode = calibrate_mode(held_N, _is_malicious(training.held_out), target)
    return Judged(
        scores_N=scores_N,
        is_malicious_N=_is_malicious(examples),
        threshold=mode.threshold,
        p_malicious_N=mode.probabilities(scores_N),
    )


def _speed(
    guard: LoadedGuard, sets: Sequence[DataSet], modes: Sequence[EvaluationMode], cascade: Cascade | None, rows: int
) -> dict[str, Speed]:
    """Over a draw of all sets' rows, so that short and long ones are among them."""
    if not rows:
        return {}
    prompts = [row.prompt for row in _drawn(_all(sets), rows)]
    scorer = guard.scorer(pack_tokens=PACK_TOKENS)
    latency = measure_latency(scorer, prompts, modes, rows=rows, cascade=cascade)
    rates = measure_throughput(scorer, prompts, modes, rows=rows, cascade=cascade)
    return {
        mode: Speed(rows_per_second=rates[mode], p50_seconds=latency[mode].p50_seconds, p95_seconds=latency[mode].p95_seconds)
        for mode in modes
    }


def _escalation_rate(evaluations: Sequence[Evaluation]) -> float | None:
    rates = [(evaluation.escalation_rate, len(evaluation.scored)) for evaluation in evaluations]
    known = [(rate, rows) for rate, rows in rates if rate is not None]
    return sum(rate * rows for rate, rows in known) / sum(rows for _, rows in known) if known else None


def _flip_rate(guard: LoadedGuard, sets: Sequence[DataSet], study: Study) -> float | None:
    if not study.sampled_rows or "on" not in guard.settings.modes:
        return None
    prompts = [row.prompt for row in _drawn(_all(sets), study.sampled_rows)]
    scored = dict(guard.scorer(pack_tokens=PACK_TOKENS).sample(prompts, samples=study.samples))
    scores_NS = np.array([[each.scores[Mode.ON] for each in scored[index]] for index in range(len(prompts))])
    return flip_rate(scores_NS >= guard.settings.thresholds.get("on", 0.0))


def _attacks(guard: LoadedGuard, mode: EvaluationMode, console: Console) -> list[dict[str, Any]]:
    attacks, threshold = load_attacks(), guard.settings.thresholds.get(mode, 0.0)
    bare = RememberingScorer(guard.scorer(pack_tokens=PACK_TOKENS))

    def scorer(normalise: bool, chunk: bool) -> PromptScorer:
        chunk_tokens = CHUNK_TOKENS if chunk else None
        return defended_scorer(bare, guard.template.encoder, normalise=normalise, chunk_tokens=chunk_tokens)

    prompts = sum(1 + (attack.clean is not None) for attack in attacks)
    with Progress(console=console, transient=True) as progress:
        return attack_table(scorer, mode, threshold, attacks, _bar(progress, "attacks", 4 * prompts))


def _all(sets: Sequence[DataSet]) -> list[GuardExample]:
    return [row for each in sets for row in each.examples]


def _drawn(rows: Sequence[GuardExample], most: int) -> list[GuardExample]:
    """A seeded draw."""
    return sorted(rows, key=lambda row: seeded_rank(0, f"{row.where}\0{row.id}"))[:most]


def _is_malicious(examples: Sequence[GuardExample]) -> np.ndarray:
    return np.array([example.label is Label.MALICIOUS for example in examples])


def _name_of(example: GuardExample) -> str:
    return example.id or example.where
