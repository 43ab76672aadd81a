"""Tiny guards for tests of serving: random weights, thresholds among the scores of a few texts, and a model that can be held."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiny_models import POLICY, build_tiny, user

from guardtrain.data.template import GuardTemplate
from guardtrain.inference.calibration import Calibration, ModeCalibration
from guardtrain.inference.guards import GuardSettings, LoadedGuard
from guardtrain.inference.live import LiveScorer
from guardtrain.inference.scored import Scored
from guardtrain.serve.backend import ThreadBackend
from guardtrain.serve.engine import Engine
from guardtrain.serve.facts import GuardFacts
from guardtrain.serve.guard import Guard
from guardtrain.serve.options import GuardOptions
from guardtrain.types import Mode

MAX_REASON_TOKENS = 6
THINGS = ("rules", "plants", "files", "keys")
TEXTS = tuple(f"{verb} the {thing} now." for verb in ("Print", "Water", "Delete") for thing in THINGS)


def scores_of_texts(guard: LoadedGuard, texts: Sequence[str]) -> list[Scored]:
    """What the scorer of evaluation says of each text, in both modes."""
    scored = dict(guard.scorer().score([user(text) for text in texts], list(Mode)))
    return [scored[index] for index in range(len(texts))]


def load_tiny(tokenizer: Any, kind: str = "llama") -> LoadedGuard:
    """A random guard, calibrated so that it flags half of TEXTS in each mode and is unsure of a third of them in mode off."""
    settings = GuardSettings(base_model="tiny", policy=POLICY, max_reason_tokens=MAX_REASON_TOKENS, max_prompt_tokens=200)
    template = GuardTemplate(tokenizer, POLICY)
    guard = LoadedGuard(build_tiny(kind, vocab_size=len(tokenizer)), tokenizer, template, settings, is_trained=True)
    scored = scores_of_texts(guard, TEXTS)
    off, on = (sorted(each.scores[mode] for each in scored) for mode in (Mode.OFF, Mode.ON))
    both = sorted(sum(each.scores.values()) / 2 for each in scored)
    modes = {
        name: ModeCalibration(temperature=1.5, bias=0.25, threshold=(values[5] + values[6]) / 2)
        for name, values in (("off", off), ("on", on), ("both", both))
    }
    calibration = Calibration(method="rows", date="2026-11-22", modes=modes, rows=12, malicious=6, target_fpr=0.5)
    band = ((off[3] + off[4]) / 2, (off[7] + off[8]) / 2)
    return replace(guard, settings=replace(settings, calibration=calibration, cascade=band))


def write_tiny(guard: LoadedGuard, folder: Path) -> Path:
    """The guard as a folder that `load_guard` takes."""
    guard.model.set_attn_implementation("sdpa")
    guard.model.save_pretrained(folder)
    guard.tokenizer.save_pretrained(folder)
    guard.settings.write(folder)
    return folder


@dataclass
class HeldModel:
    """Every forward of a model waits while it is held; `fed` counts the tokens of each that began."""

    model: Any
    fed: list[int] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.free.set()
        self.model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.fed.append(kwargs["input_ids"].numel())
        assert self.free.wait(30)

    async def begun(self, forwards: int) -> None:
        """Wait until so many forwards have begun."""
        while len(self.fed) < forwards:
            await asyncio.sleep(0.005)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is computed meanwhile."""
        self.free.clear()
        try:
            yield
        finally:
            self.free.set()


def guard_of(loaded: LoadedGuard, mode: str | None = None, **options: Any) -> Guard:
    """A guard over a loaded model, in this process."""
    limits = GuardOptions(**options)

    def load() -> tuple[Engine, GuardFacts]:
        template = loaded.template
        live = LiveScorer(loaded.model, loaded.tokenizer, template, max_reason_tokens=loaded.settings.max_reason_tokens)
        encode = lambda prompt: template.prompt_segment(prompt).input_ids  # noqa: E731
        engine = Engine(live, encode, max_batch=limits.max_batch, batch_tokens=limits.batch_tokens)
        return engine, GuardFacts.of(loaded.settings, template.encoder)

    return Guard(ThreadBackend(load), "tiny", mode, limits)
