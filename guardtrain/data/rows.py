"""A raw record to one typed example, or to everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guardtrain.data.columns import read_label, unknown_label_line
from guardtrain.data.problems import Cause, Problem
from guardtrain.data.records import Record
from guardtrain.data.turns import BrokenTurns, chat_fault, checked_text, is_blank, read_turns
from guardtrain.types import ChatExample, GuardExample, Label, Turn


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read the rows of one file. columns: our field to their column. labels: the user's label map in plain form."""

    columns: Mapping[str, str]
    labels: Mapping[str, Label]
    source: str  # the source of rows that name none
    label: Label | None = None  # of every row, for files without a label column


def guard_row(record: Record, reading: Reading) -> tuple[GuardExample | None, list[Problem]]:
    """The labelled prompt of a record, or None and each thing that is wrong with the row. Pure."""
    values = _our_values(record, reading)
    row_id = _word(values.get("id"))
    problems: list[Problem] = []

    def note(cause: Cause, what: str) -> None:
        problems.append(Problem(where=record.where, cause=cause, what=what, row_id=row_id, row=record.values))

    prompt = _prompt(values.get("prompt"), note)
    label = _label(values, reading, note)
    reason = _reason(values.get("reason"), note)
    if problems or label is None:
        return None, problems
    example = GuardExample(
        prompt=prompt,
        label=label,
        reason=reason,
        id=row_id,
        source=_word(values.get("source")) or reading.source,
        category=_word(values.get("category")),
        pair=_word(values.get("pair")),
        where=record.where,
    )
    return example, []


def chat_row(record: Record, reading: Reading) -> tuple[ChatExample | None, list[Problem]]:
    """The conversation of a record (turns, or a question and its answer), or None and what is wrong with the row. Pure."""
    values = _our_values(record, reading)
    row_id = _word(values.get("id"))
    try:
        turns = _chat_turns(values)
        fault = chat_fault(turns)
    except BrokenTurns as error:
        fault = str(error)
    if fault:
        return None, [Problem(where=record.where, cause=Cause.BROKEN_CHAT, what=fault, row_id=row_id, row=record.values)]
    source = _word(values.get("source")) or reading.source
    return ChatExample(turns=turns, id=row_id, source=source, where=record.where), []


def _our_values(record: Record, reading: Reading) -> dict[str, Any]:
    return {field: record.values.get(column) for field, column in reading.columns.items()}


def _word(value: Any) -> str:
    """An id, source, category or pair as text; numbers are fine."""
    return "" if value is None else str(value).strip()


def _prompt(value: Any, note: Any) -> tuple[Turn, ...]:
    if value is None:
        note(Cause.EMPTY_PROMPT, "expected a prompt, found none")
        return ()
    try:
        turns = read_turns(value)
    except BrokenTurns as error:
        note(Cause.BROKEN_PROMPT, f"prompt: {error}")
        return ()
    if is_blank(turns):
        note(Cause.EMPTY_PROMPT, "expected a prompt, found an empty text")
    return turns


def _label(values: Mapping[str, Any], reading: Reading, note: Any) -> Label | None:
    if reading.label is not None:
        return reading.label
    column = reading.columns["label"]
    label = read_label(values.get("label"), column, reading.labels)
    if label is None:
        note(Cause.UNKNOWN_LABEL, unknown_label_line(values.get("label"), column))
    return label


def _reason(value: Any, note: Any) -> str | None:
    """The reason, or None where a row has none: such a row trains mode `off` only."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        note(Cause.BROKEN_REASON, f"reason: expected a text, found {type(value).__name__}")
        return None
    try:
        return checked_text(value).strip() or None
    except BrokenTurns as error:
        note(Cause.BROKEN_REASON, f"reason: {error}")
        return None


def _chat_turns(values: Mapping[str, Any]) -> tuple[Turn, ...]:
    system = _extra_text(values, "system")
    first = (Turn("system", system),) if system else ()
    if values.get("messages") is not None:
        if isinstance(values["messages"], str):
            raise BrokenTurns("expected a list of turns, found a text")
        turns = read_turns(values["messages"])
        return first + turns  # two system turns are then a fault in the order of roles
    return first + _question(values) + _answer(values.get("response"))


def _question(values: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The user's side: an instruction, its input below it where there is one; TRL writes a list of turns here."""
    turns = read_turns(values.get("prompt"))
    extra = _extra_text(values, "input")
    if not extra:
        return turns
    if len(turns) != 1:
        raise BrokenTurns("an input beside a prompt of several turns: put it into a turn")
    return (Turn("user", f"{turns[0].content}\n\n{extra}"),)


def _extra_text(values: Mapping[str, Any], field: str) -> str:
    value = values.get(field)
    if value is not None and not isinstance(value, str):
        raise BrokenTurns(f"{field}: expected a text, found {type(value).__name__}")
    return checked_text(value or "") if (value or "").strip() else ""


def _answer(value: Any) -> tuple[Turn, ...]:
    if isinstance(value, str):
        return (Turn("assistant", checked_text(value)),)
    return read_turns(value)
