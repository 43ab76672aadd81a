"""The sources of a recipe to typed rows: read, join reasons, leave out what the recipe excludes, weigh.

Reading never raises for bad data: it returns every problem of every source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from guardtrain.config import Source
from guardtrain.data.columns import CHAT_COLUMNS, GUARD_COLUMNS, check_label_map, match_columns, plain_name
from guardtrain.data.keys import pair_of, row_key, seeded_rank
from guardtrain.data.problems import AnyExample, Cause, Problem
from guardtrain.data.records import STARTERS, Record, read_records
from guardtrain.data.rows import Reading, chat_row, guard_row
from guardtrain.data.turns import BrokenTurns, checked_text
from guardtrain.errors import DataError
from guardtrain.types import Example, GuardExample, Label

Kind = Literal["guard", "instruct"]
RowReader = Callable[[Record, Reading], tuple[Example | None, list[Problem]]]


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """The rows of a mixture, in the order of its sources, each once.

    notes: what was done that a reader should know: rows left out, reasons joined.
    source_numbers: the place of each row's source in the recipe, by the row's address.
    """

    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source_numbers: dict[str, int] = field(default_factory=dict)

    def by_source(self, examples: Sequence[AnyExample], num_sources: int) -> list[list[AnyExample]]:
        """`examples` (some of these rows) in one list per source of the recipe, for `apply_weights`."""
        groups: list[list[AnyExample]] = [[] for _ in range(num_sources)]
        for example in examples:
            groups[self.source_numbers[example.where]].append(example)
        return groups


def load_sources(sources: Sequence[Source], kind: Kind) -> LoadedRows:
    """Read every source of a mixture. Weights come later (`apply_weights`), after checks and the validation split."""
    loaded = LoadedRows()
    side = _SideFiles(loaded)
    for number, source in enumerate(sources):
        examples, problems = read_source(source, kind)
        loaded.problems.extend(problems)
        if any(example.where in loaded.source_numbers for example in examples):
            what = "this source is listed twice: give it once, with a weight"
            loaded.problems.append(Problem(where=source.path, cause=Cause.SAME_SOURCE, what=what))
            continue
        examples = side.apply(examples, source)
        loaded.examples.extend(examples)
        loaded.source_numbers.update((example.where, number) for example in examples)
    side.report()
    return loaded


def read_source(source: Source, kind: Kind) -> tuple[list[Example], list[Problem]]:
    """The rows of one source and every problem; without its reasons and exclusions, which `load_sources` applies."""
    examples: list[Example] = []
    problems: list[Problem] = []
    records: list[Record] = []
    for item in read_records(source.path, source.split, source.config):
        if isinstance(item, Record):
            records.append(item)
        else:
            problems.append(item)
    if not records:
        return examples, problems
    try:
        reading = _reading(source, kind, records)
    except DataError as error:
        return examples, [*problems, Problem(where=source.path, cause=Cause.COLUMNS, what=_without_where(error))]
    read_row: RowReader = guard_row if kind == "guard" else chat_row
    for record in records:
        example, found = read_row(record, reading)
        problems.extend(found)
        if example is not None:
            examples.append(example)
    return examples, problems


def apply_weights(examples_by_source: Sequence[Sequence[AnyExample]], weights: Sequence[float], seed: int) -> list[AnyExample]:
    """The rows of one epoch: weight 0.5 draws half of a source's rows, 2 gives each row twice, 2.5 both.

    Pure and independent of the order of rows: a row's place in the draw comes from `seed` and its content. The two rows
    of a minimal pair share a place, so that at most one pair per source is cut.
    """
    weighted: list[AnyExample] = []
    for examples, weight in zip(examples_by_source, weights, strict=True):
        whole = int(weight)
        weighted.extend(list(examples) * whole)
        weighted.extend(_draw(examples, round((weight - whole) * len(examples)), seed))
    return weighted


def _draw(examples: Sequence[AnyExample], count: int, seed: int) -> list[AnyExample]:
    def place(index: int) -> tuple[int, str]:
        key = row_key(examples[index])
        return seeded_rank(seed, pair_of(examples[index]) or key), key

    drawn = sorted(range(len(examples)), key=place)[:count]
    return [examples[index] for index in sorted(drawn)]


def _reading(source: Source, kind: Kind, records: Sequence[Record]) -> Reading:
    found = list(dict.fromkeys(column for record in records for column in record.values))
    columns = _guard_columns(found, source) if kind == "guard" else _chat_columns(found, source)
    labels = check_label_map(source.labels, source.path)
    name = source.path if source.path in STARTERS else Path(source.path).stem
    return Reading(columns, labels, name, Label(source.label) if source.label else None)


def _guard_columns(found: list[str], source: Source) -> dict[str, str]:
    if source.label is None:
        return match_columns(found, GUARD_COLUMNS, source.columns, ("prompt", "label"), source.path)
    # Every row has the same label: a column that looks like one is another thing.
    table = {field: names for field, names in GUARD_COLUMNS.items() if field != "label"}
    return match_columns(found, table, source.columns, ("prompt",), source.path)


def _chat_columns(found: list[str], source: Source) -> dict[str, str]:
    """Turns in one column where there is one; otherwise a question and its answer."""
    turn_names = {source.columns.get("messages"), *(name for name in found if plain_name(name) in CHAT_COLUMNS["messages"])}
    if turn_names - {None} and not {"prompt", "response"} & set(source.columns):
        return match_columns(found, CHAT_COLUMNS, source.columns, ("messages",), source.path)
    table = {field: names for field, names in CHAT_COLUMNS.items() if field != "messages"}
    if not any(plain_name(name) in table["prompt"] for name in found):
        # Some sets have `input` and `output` and no instruction: there the input is the question.
        table = {**table, "prompt": table["prompt"] + table["input"], "input": ()}
    return match_columns(found, table, source.columns, ("prompt", "response"), source.path)


def _without_where(error: DataError) -> str:
    return str(DataError(error.what, expected=error.expected, found=error.found, hint=error.hint))


class _SideFiles:
    """The reasons and exclusions of a mixture. A file that several sources share is read once, and its ids that are in
    no row are counted over all of them."""

    def __init__(self, loaded: LoadedRows) -> None:
        self.loaded = loaded
        self.tables: dict[tuple[str, str], dict[str, str]] = {}
        self.unmatched: dict[tuple[str, str], set[str]] = {}

    def apply(self, examples: list[Example], source: Source) -> list[Example]:
        """`examples` with their reasons and without the excluded rows; what happened goes into the notes."""
        ids = {example.id for example in examples}
        if source.exclude is not None:
            excluded = self._table(source.exclude, "id", ids)
            kept = [example for example in examples if example.id not in excluded]
            self.loaded.notes.append(f"{source.path}: {len(examples) - len(kept)} rows left out by {source.exclude}")
            examples = kept
        if source.reasons is not None:
            examples = self._join(examples, self._table(source.reasons, "reason", ids), source)
        return examples

    def _join(self, examples: list[Example], reasons: dict[str, str], source: Source) -> list[Example]:
        count = sum(example.id in reasons for example in examples)
        replaced = sum(_replaces(example, reasons) for example in examples)
        note = f"{source.path}: {count} reasons joined from {source.reasons}"
        self.loaded.notes.append(note + (f", of which {replaced} replace another reason" if replaced else ""))
        return [_with_reason(example, reasons) for example in examples]

    def report(self) -> None:
        """Say which ids were in no row. None at all matching means the wrong file or no id column: an error."""
        for (path, key), ids in self.unmatched.items():
            total = len(self.tables[path, key])
            if ids:
                cause = Cause.UNMATCHED_ID if len(ids) < total else Cause.NO_ID_MATCHES
                self.loaded.problems.append(Problem(where=path, cause=cause, what=f"{len(ids)} of {total} ids are in no row"))

    def _table(self, path: str, key: str, ids: set[str]) -> dict[str, str]:
        if (path, key) not in self.tables:
            table, problems = _read_table(path, key)
            self.tables[path, key] = table
            self.unmatched[path, key] = set(table)
            self.loaded.problems.extend(problems)
        self.unmatched[path, key] -= ids
        return self.tables[path, key]


def _with_reason(example: Example, reasons: dict[str, str]) -> Example:
    if isinstance(example, GuardExample) and example.id in reasons:
        return replace(example, reason=reasons[example.id])
    return example


def _replaces(example: Example, reasons: dict[str, str]) -> bool:
    own = example.reason if isinstance(example, GuardExample) else None
    return own is not None and reasons.get(example.id, own) != own


def _read_table(path: str, key: str) -> tuple[dict[str, str], list[Problem]]:
    """The `key` of each `id` in a JSONL file (or any other format that sources may have), and every problem."""
    table: dict[str, str] = {}
    problems: list[Problem] = []
    for item in read_records(path):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        row_id, value = item.values.get("id"), item.values.get(key)
        fault = _table_fault(table, row_id, key, value)
        if fault:
            cause = Cause.BROKEN_REASON if key == "reason" else Cause.BROKEN_ROW
            problems.append(Problem(where=item.where, cause=cause, what=fault, row=item.values))
        else:
            table[str(row_id).strip()] = str(value).strip()
    return table, problems


def _table_fault(table: dict[str, str], row_id: Any, key: str, value: Any) -> str | None:
    if not isinstance(row_id, (str, int)) or not str(row_id).strip():
        return "expected an id, found none"
    if key == "reason" and (not isinstance(value, str) or not value.strip()):
        return "expected a reason, found none"
    if key == "reason" and table.get(str(row_id).strip(), str(value).strip()) != str(value).strip():
        return "a second, different reason for this id"
    try:
        checked_text(str(value))
    except BrokenTurns as error:
        return f"reason: {error}"
    return None
