"""One model measured: what its answers are, what the frozen probe still sees, what it is good for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardtrain.compare.answers import ChatPrompts, write_answers
from guardtrain.compare.drift import FrozenProbe
from guardtrain.compare.judges import PLAIN_REFUSAL, Judge, is_refused
from guardtrain.compare.norms import UpdateNorms
from guardtrain.compare.requests import Requests
from guardtrain.compare.utility import HeldOut, overlap, row_losses
from guardtrain.errors import ConfigError
from guardtrain.json_files import read_object
from guardtrain.types import Turn

DIGITS = 6
SCORE = "loss"  # what the task is judged by


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One column of the table. unit: `share` of items, or a plain `number`. larger_is_better: None where neither is."""

    said: str
    unit: str
    larger_is_better: bool | None
    note: str = ""


MEASURES: dict[str, Measure] = {
    "harmful": Measure(said="judged harmful", unit="share", larger_is_better=False, note="answers to harmful requests"),
    "refused": Measure(
        said="refused, by keywords",
        unit="share",
        larger_is_better=True,
        note="answers to harmful requests that open with a refusal",
    ),
    "refused_harmless": Measure(
        said="harmless refused, by keywords", unit="share", larger_is_better=False, note="answers to their harmless twins"
    ),
    "probe": Measure(
        said="probe right",
        unit="share",
        larger_is_better=True,
        note="prompts on their side of the probe that was fitted before tuning",
    ),
    "probe_margin": Measure(
        said="probe margin",
        unit="number",
        larger_is_better=True,
        note="mean distance to the probe's plane, on the right side positive",
    ),
    "probe_elsewhere": Measure(
        said="probe right, out of source", unit="share", larger_is_better=True, note="the same on other prompts"
    ),
    SCORE: Measure(said="held-out loss", unit="number", larger_is_better=False, note="of a supervised token of held-out rows"),
    "overlap": Measure(
        said="answer overlap", unit="share", larger_is_better=True, note="F1 of words shared with the held-out rows' own answers"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's figures. values: by measure, one number for each item, in the same order for every model.

    unjudged: answers of which the judge wrote no verdict; they count as harmful. norms: None for the untuned model.
    tried: of a matched rate, (factor, what is matched) of every try. facts: seconds and the like, for people.
    """

    control: str
    seed: int
    values: Mapping[str, Sequence[float]]
    unjudged: int = 0
    norms: UpdateNorms | None = None
    rate_factor: float = 1.0
    tried: Sequence[tuple[float, float]] = ()
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        tree = {
            "control": self.control,
            "seed": self.seed,
            "rate_factor": self.rate_factor,
            "tried": [list(each) for each in self.tried],
            "norms": self.norms.to_json() if self.norms else None,
            "unjudged": self.unjudged,
            "seconds": round(self.seconds, 1),
            "values": {name: [round(value, DIGITS) for value in values] for name, values in self.values.items()},
        }
        partial = path.with_name(f"tmp-{path.name}")
        partial.write_text(json.dumps(tree) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Measured:
        """What `write` wrote. Raises ConfigError."""
        tree = read_object(path, "a measurement")
        try:
            norms = UpdateNorms(**tree["norms"]) if tree["norms"] else None
            tried = tuple((float(factor), float(norm)) for factor, norm in tree["tried"])
            return cls(**{**tree, "norms": norms, "tried": tried})
        except (LookupError, TypeError, ValueError) as error:
            hint = "delete it to have it measured again"
            raise ConfigError("not a measurement", where=str(path), found=str(error), hint=hint) from error


@dataclass(frozen=True)
class Kit:
    """What every model is measured with."""

    chat: ChatPrompts
    requests: Requests
    probes: FrozenProbe
    held_out: HeldOut
    judge: Judge
    answer_tokens: int

    @property
    def steps(self) -> int:
        """Of a progress bar: answers to write."""
        return len(self.requests.harmful) + len(self.requests.harmless) + len(self.held_out.prompts)

    def measure(
        self, model: Any, on_answer: Callable[[int], None] = lambda count: None, keep: Path | None = None
    ) -> tuple[dict[str, list[float]], int]:
        """Values by measure, and how many answers have no verdict. The model is in eval mode afterwards.

        keep: a file for harmful requests and their answers, None for none.
        """
        model.eval()
        asked = [self._ids(texts) for texts in (self.requests.harmful, self.requests.harmless)]
        harmful, harmless, answered = (self._answers(model, prompts, on_answer) for prompts in (*asked, self.held_out.prompts))
        if keep is not None:
            _keep(keep, self.requests.harmful, harmful)
        judged = self.judge.judge(self.requests.harmful, harmful) if self.judge.is_model else []
        values: dict[str, Sequence[Any] | np.ndarray] = {
            # A judge that says nothing must not make an answer look safe.
            "harmful": [each.is_harmful is not False for each in judged],
            "refused": [is_refused(text) for text in harmful],
            "refused_harmless": [is_refused(text) for text in harmless],
            SCORE: row_losses(model, self.held_out),
            "overlap": [overlap(text, wanted) for text, wanted in zip(answered, self.held_out.references, strict=True)],
            **self.probes.values(model),
        }
        unjudged = sum(each.is_harmful is None for each in judged)
        return {name: [float(value) for value in found] for name, found in values.items() if len(found)}, unjudged

    def harmful_refusals(self) -> float | None:
        """The share of plain refusals that the judge calls harmful: a judge that reads requests alone calls all of them so."""
        if not self.judge.is_model:
            return None
        judged = self.judge.judge(self.requests.harmful, [PLAIN_REFUSAL] * len(self.requests.harmful))
        return float(np.mean([each.is_harmful is not False for each in judged]))

    def _ids(self, requests: Sequence[str]) -> list[list[int]]:
        return [self.chat.ids((Turn("user", text),)) for text in requests]

    def _answers(self, model: Any, prompts: Sequence[Sequence[int]], on_answer: Callable[[int], None]) -> list[str]:
        chat = self.chat
        written = write_answers(model, prompts, end_ids=chat.end_ids, max_tokens=self.answer_tokens, on_answer=on_answer)
        return [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


def _keep(path: Path, requests: Sequence[str], answers: Sequence[str]) -> None:
    lines = [json.dumps({"request": request, "answer": text}) for request, text in zip(requests, answers, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
