"""`guardtrain secure compare`: every control trained with every seed, every model measured, all of it kept as it comes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from guardtrain.compare.answers import ChatPrompts
from guardtrain.compare.controls import CONTROLS, MLLR, ORDINARY, UNTUNED, check_recipe
from guardtrain.compare.drift import FrozenProbe, fit_on, read_probe, write_probe
from guardtrain.compare.judges import Judge, load_judge
from guardtrain.compare.measure import SCORE, Kit, Measured
from guardtrain.compare.requests import Requests, digest_of_texts, load_requests
from guardtrain.compare.tuning import SET_ASIDE, Stopped, Tuned, Tuner
from guardtrain.compare.utility import encode_held_out, row_losses
from guardtrain.config import ModelConfig, Recipe
from guardtrain.data.keys import row_key
from guardtrain.data.template import ChatTemplate
from guardtrain.errors import ConfigError
from guardtrain.inference.guards import load_saved
from guardtrain.json_files import read_object
from guardtrain.model.load import load_model, load_tokenizer
from guardtrain.model.merge import base_folder
from guardtrain.options import read_text
from guardtrain.overrides import recipe_to_tree
from guardtrain.secure.prompts import FIT, Prompts, data_digest, load_prompts
from guardtrain.secure.result import RobustModules, model_fingerprint
from guardtrain.secure.search import OUTSIDE, REPORT, SEARCH
from guardtrain.train.rows import load_rows
from guardtrain.types import ChatExample

log = logging.getLogger(__name__)

SETTINGS, PROBE = "settings.json", "probe.npz"
PAIRS = 200
FOLDERS = ("runs", "measured", "answers")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, and how it is measured.

    out: the folder of runs, measurements and report. controls, seeds: what is trained. harmful: sources of requests. judge:
    see `load_judge`; judge_template: its text. most_requests: of each source. answer_tokens: an answer is cut after so many.
    utility_rows: held-out rows that are measured, all if absent; answered_rows: of these, how many are answered too.
    keep_models, keep_answers: what else stays on disk.
    """

    recipe: Recipe
    out: Path
    controls: tuple[str, ...]
    seeds: tuple[int, ...]
    harmful: tuple[str, ...] = ("starter",)
    judge: str = "keywords"
    judge_template: Path | None = None
    most_requests: int = 100
    answer_tokens: int = 64
    utility_rows: int | None = 100
    answered_rows: int = 32
    keep_models: bool = False
    keep_answers: bool = False


@dataclass(frozen=True)
class Outcome:
    """Everything that a report is made of. models: by control, one for each seed; one for the untuned model."""

    study: Study
    models: Mapping[str, Sequence[Measured]]
    modules: RobustModules | None
    judge: Judge
    requests: Requests
    harmful_refusals: float | None
    settings: Mapping[str, Any] = field(repr=False)


def run_study(study: Study, *, console: Console) -> Outcome | None:
    """Train and measure what is not measured yet; None where it was told to stop, after which the same call goes on.

    Raises a GuardtrainError before anything is trained where the comparison cannot work.
    """
    check_recipe(study.recipe, study.controls)
    modules = RobustModules.read(Path(study.recipe.secure.modules)) if study.recipe.secure.modules else None
    bench = _Bench(study, modules, console)
    bench.settle()
    models: dict[str, list[Measured]] = {name: [] for name in study.controls}
    wanted = [(name, seed) for seed in study.seeds for name in study.controls if name != UNTUNED or seed == study.seeds[0]]
    try:
        for number, (name, seed) in enumerate(wanted, start=1):
            models[name].append(bench.measured(name, seed, f"{number} of {len(wanted)}"))
    except Stopped:
        log.warning("stopped; the same command goes on")
        return None
    return Outcome(study, models, modules, bench.judge, bench.requests, bench.harmful_refusals(), bench.settings)


class _Bench:
    """What all models are measured with, made once; and what they left."""

    def __init__(self, study: Study, modules: RobustModules | None, console: Console) -> None:
        self.study, self.modules, self.console = study, modules, console
        model = study.recipe.model
        tokenizer = load_tokenizer(model.name, model.revision)
        self.chat = ChatPrompts(tokenizer)
        self.requests = load_requests(study.harmful, study.most_requests, study.recipe.data.seed)
        template = ChatTemplate(tokenizer)
        rows = load_rows(study.recipe, template)
        chats = [row for row in rows.validation if isinstance(row, ChatExample)]
        self.held_out = encode_held_out(chats[: study.utility_rows], template, self.chat, study.answered_rows)
        self.prompts = _probe_prompts(tokenizer, modules)
        self.judge = load_judge(study.judge, study.judge_template)
        self.settings = self._settings(digest_of_texts([row_key(row) for row in rows.train]))
        robust = modules.robust if modules else ()
        self.tuner = Tuner(study.recipe, study.out / "runs", base_folder(model.name, model.revision), robust, console)
        self._probe: FrozenProbe | None = None

    def settle(self) -> None:
        """Take the folder, or find that it is this comparison's. Raises ConfigError."""
        out, path = self.study.out, self.study.out / SETTINGS
        if path.is_file():
            before = read_object(path, "settings of a comparison")
            if differing := sorted(key for key in before.keys() | self.settings if before.get(key) != self.settings.get(key)):
                hint = "--out names another folder"
                raise ConfigError(
                    "another comparison lies here", where=str(out), found=f"other {', '.join(differing)}", hint=hint
                )
        elif out.exists() and any(out.iterdir()):
            raise ConfigError("not a comparison's folder", where=f"--out {out}", expected="a new or empty one")
        for name in FOLDERS[:2]:
            (out / name).mkdir(parents=True, exist_ok=True)
        _write_json(path, self.settings)

    def measured(self, name: str, seed: int, place: str) -> Measured:
        """The measurement of one control, made unless it is there. Raises Stopped."""
        path = self.study.out / "measured" / f"{name}-{seed}.json"
        if path.is_file():
            return Measured.read(path)
        log.info("%s: %s, seed %d", place, name, seed)
        start = time.perf_counter()
        if name == UNTUNED:
            tuned, model = None, self._untouched()
        else:
            tuned = self._tuned(name, seed)
            model = self._load(tuned)
        values, unjudged = self._measure(model, name, seed)
        facts: dict[str, Any] = {"norms": tuned.norms, "rate_factor": tuned.rate_factor, "tried": tuned.tried} if tuned else {}
        seconds = time.perf_counter() - start
        Measured(control=name, seed=seed, values=values, unjudged=unjudged, seconds=seconds, **facts).write(path)
        if not self.study.keep_models:
            self.tuner.discard(name, seed)
        return Measured.read(path)  # what every later call reads, to the last digit

    def harmful_refusals(self) -> float | None:
        """See `Kit`; measured once."""
        path = self.study.out / "measured" / "judge.json"
        if not path.is_file():
            _write_json(path, {"harmful_refusals": self._kit().harmful_refusals()})
        found = read_object(path, "what the judge says of refusals")["harmful_refusals"]
        return None if found is None else float(found)

    def _tuned(self, name: str, seed: int) -> Tuned:
        control = CONTROLS[name]
        if not control.is_matched:
            return self.tuner.tuned(name, seed, self.study.recipe.secure.rho if control.rate == "lower" else 1.0)
        target, ordinary = self._reached(name, MLLR, seed), self._reached(name, ORDINARY, seed)
        return self.tuner.matched(name, seed, self._reaching(name), target, ordinary, self._correction(name, seed))

    def _correction(self, name: str, seed: int) -> float:
        """How far the first guess of the rate was off with the seed before."""
        before = self.study.seeds[: self.study.seeds.index(seed)]
        if not before:
            return 1.0
        matched = self._made(name, before[-1])
        return matched.rate_factor * self._reached(name, ORDINARY, before[-1]) / self._reached(name, MLLR, before[-1])

    def _reaching(self, matched: str) -> Callable[[Tuned], float]:
        """What a run reached of that in which a control is matched."""
        if CONTROLS[matched].rate == "update":
            return lambda tuned: tuned.norms.update
        before = self._loss_before()
        return lambda tuned: before - float(row_losses(self._load(tuned), self.held_out).mean())

    def _reached(self, matched: str, name: str, seed: int) -> float:
        """The same of a control that is measured."""
        made = self._made(name, seed)
        if CONTROLS[matched].rate == "learnt":
            return self._loss_before() - float(np.mean(made.values[SCORE]))
        assert made.norms is not None
        return made.norms.update

    def _loss_before(self) -> float:
        return float(np.mean(self._made(UNTUNED, self.study.seeds[0]).values[SCORE]))

    def _made(self, name: str, seed: int) -> Measured:
        return Measured.read(self.study.out / "measured" / f"{name}-{seed}.json")

    def _measure(self, model: Any, name: str, seed: int) -> tuple[dict[str, list[float]], int]:
        keep = self.study.out / "answers" / f"{name}-{seed}.jsonl" if self.study.keep_answers else None
        kit = self._kit()
        columns = (TextColumn("measure {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(f"{name}, seed {seed}", total=kit.steps)
            return kit.measure(model, lambda count: progress.advance(task, count), keep)

    def _kit(self) -> Kit:
        if self._probe is None:
            self._probe = self._frozen()
        return Kit(self.chat, self.requests, self._probe, self.held_out, self.judge, self.study.answer_tokens)

    def _frozen(self) -> FrozenProbe:
        """Fitted once and kept: another process's fit would differ in its last bits."""
        path, layer = self.study.out / PROBE, self.modules.settings["layer"] if self.modules else None
        if not path.is_file():
            write_probe(fit_on(self._untouched(), self.prompts[FIT], layer), path)
        return FrozenProbe(read_probe(path), self.prompts[REPORT], self.prompts.get(OUTSIDE), layer)

    def _untouched(self) -> Any:
        return load_model(self.study.recipe.model, _dtype()).to(_device())

    def _load(self, tuned: Tuned) -> Any:
        model = self.study.recipe.model
        return load_saved(tuned.folder.model, ModelConfig(name=model.name, revision=model.revision), _dtype()).to(_device())

    def _settings(self, training_rows: str) -> dict[str, Any]:
        """What must be the same for measurements to stand beside each other."""
        study = self.study
        recipe = {key: value for key, value in recipe_to_tree(study.recipe).items() if key not in SET_ASIDE}
        return {
            "recipe": recipe,
            "model": model_fingerprint(study.recipe.model),
            "modules": self.modules.to_json() if self.modules else None,
            "training_rows": training_rows,
            "held_out_rows": digest_of_texts([str(ids) for ids in self.held_out.ids]),
            "answered_rows": len(self.held_out.prompts),
            "requests": self.requests.digest,
            "probe": data_digest(self.prompts),
            "judge": study.judge,
            "judge_template": read_text("--judge-template", study.judge_template),
            "answer_tokens": study.answer_tokens,
        }


def _probe_prompts(tokenizer: Any, modules: RobustModules | None) -> dict[str, Prompts]:
    """The prompts of the search by part, or those that a search takes where nothing is said."""
    if modules is None:
        return load_prompts("starter", "starter-hard", tokenizer, pairs=PAIRS, seed=0)
    settings = modules.settings
    pairs = sum(settings["pairs"][part] for part in (FIT, SEARCH, REPORT))
    return load_prompts(settings["data"], settings["out_of_source"], tokenizer, pairs=pairs, seed=settings["seed"])


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    partial = path.with_name(f"tmp-{path.name}")
    partial.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
