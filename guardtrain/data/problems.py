"""What can be wrong with data. A problem is a value, not an exception, so that one pass finds all of them.

Messages never repeat a prompt: rows hold attack text, and a terminal or a log is no place for it. They give addresses,
ids and lengths.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar

from guardtrain.types import Example

Severity = Literal["error", "warning"]
AnyExample = TypeVar("AnyExample", bound=Example)


class Cause(StrEnum):
    """The kinds of problems; reports are grouped by them."""

    FILE = "unreadable file"
    NO_ROWS = "no rows"
    SAME_SOURCE = "source given twice"
    COLUMNS = "columns"
    BROKEN_ROW = "broken row"
    BROKEN_PROMPT = "broken prompt"
    EMPTY_PROMPT = "empty prompt"
    BROKEN_CHAT = "broken conversation"
    UNKNOWN_LABEL = "unknown label"
    BROKEN_REASON = "broken reason"
    NO_ID_MATCHES = "no id matches"
    CONFLICTING_LABELS = "conflicting labels"
    EXACT_DUPLICATE = "exact duplicate"
    OVER_BUDGET = "over the token budget"
    SEVERAL_SENTENCES = "reason of several sentences"
    NAMES_VERDICT = "reason names the verdict"
    ONE_CLASS = "one class only"
    LEAK = "validation row also in training"
    # From here on advice: training is possible.
    NEAR_LEAK = "validation row close to a training row"
    NEAR_DUPLICATE = "near-duplicate"
    SAME_ID = "id used twice"
    UNMATCHED_ID = "id in no row"
    IMBALANCE = "class imbalance"
    LENGTH_GAP = "length gap between classes"
    REASON_LENGTH_GAP = "reason length gap between classes"


WARNINGS = frozenset(
    {
        Cause.NEAR_LEAK,
        Cause.NEAR_DUPLICATE,
        Cause.SAME_ID,
        Cause.UNMATCHED_ID,
        Cause.IMBALANCE,
        Cause.LENGTH_GAP,
        Cause.REASON_LENGTH_GAP,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    where: ``file:line`` of a row, or the file, or ``all rows``.
    what: one line, without prompt text.
    row: the row as it was read (or the Example), None when the problem is not one row's.
    """

    where: str
    cause: Cause
    what: str
    row_id: str = ""
    row: Any = field(default=None, repr=False, compare=False)

    @property
    def severity(self) -> Severity:
        """`error`: the row (or the whole set) cannot be trained on. `warning`: it can, but look at it."""
        return "warning" if self.cause in WARNINGS else "error"

    def to_json(self) -> dict[str, str]:
        """Plain data for machines; the row itself stays out of it."""
        return {
            "where": self.where,
            "cause": self.cause.value,
            "severity": self.severity,
            "what": self.what,
            "row_id": self.row_id,
        }


def errors_of(problems: Iterable[Problem]) -> list[Problem]:
    """The problems that forbid training."""
    return [problem for problem in problems if problem.severity == "error"]


def set_aside(examples: Sequence[AnyExample], problems: Iterable[Problem]) -> list[AnyExample]:
    """The examples that no error names, in order. Pure."""
    bad = {problem.where for problem in errors_of(problems) if problem.row is not None}
    return [example for example in examples if example.where not in bad]


def write_rejects(problems: Iterable[Problem], path: str | Path) -> int:
    """Write each row that an error names to the JSONL file `path`, so that nothing is lost; the number of lines written.

    A line has `where`, `cause`, `what`, `id` and `row` (the row as it was read). A row with two errors has two lines.
    """
    lines = [_reject_line(problem) for problem in errors_of(problems) if problem.row is not None]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _reject_line(problem: Problem) -> str:
    row = dataclasses.asdict(problem.row) if dataclasses.is_dataclass(problem.row) else problem.row  # type: ignore[arg-type]
    line = {"where": problem.where, "cause": problem.cause.value, "what": problem.what, "id": problem.row_id, "row": row}
    # ASCII, because a broken row may hold half of a surrogate pair, which UTF-8 cannot express.
    return json.dumps(line, ensure_ascii=True, default=repr)
