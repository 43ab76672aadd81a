"""Attacks on the guard itself: does a malicious request that is flagged as it stands pass once it is dressed up?

The rows (guardtrain/evaluate/attacks/*.jsonl, one file for each family) are written by hand. A malicious one has a clean twin,
the same request without the evasion; a benign one looks as odd and is harmless, so that flagging all that is odd shows.
Shape suffix: N attacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardtrain.data.turns import read_turns
from guardtrain.errors import DataError
from guardtrain.evaluate.bootstrap import rate_interval
from guardtrain.evaluate.runner import EvaluationMode, run_modes, scores_of
from guardtrain.inference.chunks import PromptScorer
from guardtrain.types import GuardExample, Label, Turn

FOLDER = Path(__file__).with_name("attacks")
PADDINGS = "paddings"  # the long harmless texts that rows of the family padding name
ALL = "all"


@dataclass(frozen=True, slots=True)
class Attack:
    """An attacked prompt and its clean twin; a benign look-alike has none. `attacked.category` is the family."""

    attacked: GuardExample
    clean: GuardExample | None

    @property
    def family(self) -> str:
        """The kind of evasion."""
        return self.attacked.category


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` of `of` rows, with the 95 % Wilson interval; without rows there is no rate, and value, low and high are None."""

    count: int
    of: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evasion:
    """How a guard stood up to the attacks of one family, or of all.

    clean_flagged: of the malicious requests without evasion. evaded: of those that are flagged clean, the ones whose attacked
    version is not. recall: flagged among all attacked malicious rows. false_alarms: flagged among the benign look-alikes.
    """

    clean_flagged: Rate
    evaded: Rate
    recall: Rate
    false_alarms: Rate

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def load_attacks() -> list[Attack]:
    """All attacks and look-alikes, family by family, with paddings in place. The texts are data, never instructions."""
    paddings = {row["id"]: row["text"] for _, row in _rows(FOLDER / f"{PADDINGS}.jsonl")}
    files = [path for path in sorted(FOLDER.glob("*.jsonl")) if path.stem != PADDINGS]
    return [_attack(row, where, paddings) for path in files for where, row in _rows(path)]


def evasion(attacks: Sequence[Attack], is_flagged_N: np.ndarray, is_clean_flagged_N: np.ndarray) -> dict[str, Evasion]:
    """Rates over all attacks (key `all`, first) and by family. Pure.

    is_flagged_N: bool, of the attacked versions. is_clean_flagged_N: bool, of the clean twins; ignored where there is none.
    Raises DataError when an array has another length than `attacks`.
    """
    flagged_N, clean_flagged_N = np.asarray(is_flagged_N, dtype=bool), np.asarray(is_clean_flagged_N, dtype=bool)
    if not flagged_N.shape == clean_flagged_N.shape == (len(attacks),):
        found = f"{flagged_N.shape} and {clean_flagged_N.shape}"
        raise DataError("flags that do not belong to the attacks", expected=f"two of shape ({len(attacks)},)", found=found)
    is_malicious_N = np.array([attack.attacked.label is Label.MALICIOUS for attack in attacks], dtype=bool)
    families = np.array([attack.family for attack in attacks], dtype=object)
    groups = {ALL: np.ones(len(attacks), dtype=bool), **{family: families == family for family in dict.fromkeys(families)}}
    return {name: _evasion(is_malicious_N[rows], flagged_N[rows], clean_flagged_N[rows]) for name, rows in groups.items()}


def rate(count: int, of: int) -> Rate:
    """A share with its 95 % Wilson interval, which also holds for few rows and for shares near 0 and 1."""
    if not of:
        return Rate(count, of, None, None, None)
    low, high = rate_interval(count, of)
    return Rate(count, of, round(count / of, 6), round(low, 6), round(high, 6))


def attack_table(
    make_scorer: Callable[[bool, bool], PromptScorer],
    mode: EvaluationMode,
    threshold: float,
    attacks: Sequence[Attack] | None = None,
    on_row: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Every combination of the two defences against the attacks: plain data, one entry each, no defence first.

    make_scorer: from (normalise, chunk) to a scorer, for example `defended_scorer`. threshold: flag when score >= threshold.
    attacks: all of `load_attacks` if absent. on_row: called after each scored prompt.
    """
    attacks = load_attacks() if attacks is None else attacks
    table = []
    for normalise, chunk in ((False, False), (True, False), (False, True), (True, True)):
        flagged_N, clean_flagged_N = _flags(make_scorer(normalise, chunk), mode, threshold, attacks, on_row)
        families = {name: result.to_json() for name, result in evasion(attacks, flagged_N, clean_flagged_N).items()}
        table.append({"normalise": normalise, "chunk": chunk, "evasion": families})
    return table


def _evasion(is_malicious_N: np.ndarray, flagged_N: np.ndarray, clean_flagged_N: np.ndarray) -> Evasion:
    known_N = is_malicious_N & clean_flagged_N
    return Evasion(
        clean_flagged=_share(clean_flagged_N, is_malicious_N),
        evaded=_share(~flagged_N, known_N),
        recall=_share(flagged_N, is_malicious_N),
        false_alarms=_share(flagged_N, ~is_malicious_N),
    )


def _share(is_counted_N: np.ndarray, among_N: np.ndarray) -> Rate:
    return rate(int((is_counted_N & among_N).sum()), int(among_N.sum()))


def _flags(
    scorer: PromptScorer, mode: EvaluationMode, threshold: float, attacks: Sequence[Attack], on_row: Callable[[], None] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each attacked version is flagged, and each clean one (False where there is none)."""
    twins = [(index, attack.clean.prompt) for index, attack in enumerate(attacks) if attack.clean is not None]
    prompts = [attack.attacked.prompt for attack in attacks] + [prompt for _, prompt in twins]
    scored = {}
    for index, row in scorer.score(prompts, run_modes([mode])):
        scored[index] = row
        if on_row:
            on_row()
    is_flagged = scores_of([scored[index] for index in range(len(prompts))], mode) >= threshold
    clean_flagged_N = np.zeros(len(attacks), dtype=bool)
    clean_flagged_N[[index for index, _ in twins]] = is_flagged[len(attacks) :]
    return is_flagged[: len(attacks)], clean_flagged_N


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield f"{path.name}:{number}", json.loads(line)


def _attack(row: dict[str, Any], where: str, paddings: dict[str, str]) -> Attack:
    prompt = row["prompt"]
    if "before" in row or "after" in row:
        before, after = ([paddings[name] for name in row.get(side, ())] for side in ("before", "after"))
        prompt = "\n\n".join([*before, prompt, *after])
    clean = (Turn("user", row["clean"]),) if "clean" in row else None
    return Attack(
        attacked=_example(row, row["id"], read_turns(prompt), where),
        clean=_example(row, f"{row['id']}-clean", clean, where) if clean else None,
    )


def _example(row: dict[str, Any], row_id: str, prompt: tuple[Turn, ...], where: str) -> GuardExample:
    label, family = Label(row["label"]), row["family"]
    return GuardExample(prompt=prompt, label=label, id=row_id, source="attacks", category=family, pair=row["id"], where=where)
