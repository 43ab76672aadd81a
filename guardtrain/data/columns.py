"""Their names to ours: which column holds what, and which label words mean malicious. Literal tables, no guessing beyond them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from guardtrain.errors import DataError
from guardtrain.types import Label

# Our own name comes first and wins. Names are compared without case, with `-` and blanks read as `_`.
GUARD_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": (
        "prompt", "text", "input", "instruction", "query", "question", "user_input", "user_prompt", "content", "message",
        "messages", "conversation", "conversations", "goal", "behavior",
    ),
    "label": (
        "label", "labels", "is_malicious", "malicious", "is_jailbreak", "jailbreak", "jailbreaking", "is_injection", "injection",
        "is_harmful", "harmful", "is_unsafe", "unsafe", "is_toxic", "toxic", "toxicity", "is_safe", "safe", "is_benign", "benign",
        "class", "type", "safety", "verdict", "prompt_label", "prompt_harm_label", "data_type",
    ),
    # Not `rationale`: guard data sets keep there what an attack achieves or which technique it uses (InjecAgent, PyRIT).
    # Such a text exists for attacks only, so that its presence would give the label away. Ask for it with `columns:`.
    "reason": ("reason", "reasoning", "explanation"),
    "id": ("id", "uid", "uuid", "row_id"),
    "source": ("source", "dataset", "origin"),
    "category": ("category", "attack_type", "subcategory"),
    "pair": ("pair", "pair_id"),
}  # fmt: skip

CHAT_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "query"),
    "response": ("response", "completion", "output", "answer"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "id": ("id", "uid", "uuid", "row_id"),
    "source": ("source", "dataset", "origin"),
}

# Columns where yes or 1 means that the prompt is harmless.
INVERTED_FLAGS = frozenset({"is_safe", "safe", "is_benign", "benign"})
# Columns whose numbers have no usual direction: words are read, numbers need `labels:`.
UNDIRECTED = frozenset({"safety"})

LABEL_WORDS: dict[str, Label] = {
    **dict.fromkeys(
        (
            "malicious", "unsafe", "harmful", "jailbreak", "injection", "prompt_injection", "attack", "toxic",
            "adversarial_harmful", "vanilla_harmful",
        ),
        Label.MALICIOUS,
    ),
    **dict.fromkeys(
        (
            "benign", "safe", "harmless", "unharmful", "legitimate", "legit", "normal", "clean", "non_toxic", "not_toxic",
            "not_jailbreak", "non_jailbreak", "no_injection", "non_injection", "not_injection", "adversarial_benign",
            "vanilla_benign",
        ),
        Label.BENIGN,
    ),
}  # fmt: skip
TRUE_WORDS, FALSE_WORDS = frozenset({"1", "true"}), frozenset({"0", "false"})


def match_columns(
    found: Collection[str],
    table: Mapping[str, tuple[str, ...]],
    user: Mapping[str, str],
    required: Collection[str],
    where: str,
) -> dict[str, str]:
    """The column that holds each of our fields: `user` wins, then our own name, then the one well-known foreign name.

    found: every column of the file. required: fields that must be found.
    Raises DataError that lists the columns and shows the `columns:` line to write. Of two foreign names for a field that
    is not required the first of the table is taken.
    """
    _check_user_columns(found, table, user, where)
    matched = dict(user)
    for field, names in table.items():
        if field in matched:
            continue
        free = [column for column in found if column not in matched.values()]
        candidates = [column for name in names for column in free if plain_name(column) == name]
        if not candidates and field in required:
            raise _columns_error(f"no column holds the {field}", field, _others(found, matched, table), found, where)
        # `text` and `messages` may hold different things: choosing silently would train on the wrong one.
        own = sum(plain_name(column) == field for column in candidates)
        if len(candidates) > 1 and own != 1 and field in required:
            raise _columns_error(f"{' and '.join(candidates)} could each hold the {field}", field, candidates, found, where)
        if candidates:
            matched[field] = candidates[0]
    return matched


def plain_name(column: str) -> str:
    """A column name or label word in the form that the tables use."""
    return re.sub(r"[\s_-]+", "_", column.strip().casefold())


def _check_user_columns(
    found: Collection[str], table: Mapping[str, tuple[str, ...]], user: Mapping[str, str], where: str
) -> None:
    for field, column in user.items():
        if field not in table:
            raise DataError(f"columns: unknown field {field!r}", where=where, expected=f"one of {', '.join(table)}", found=field)
        if column not in found:
            near = difflib.get_close_matches(column, list(found), n=1)
            raise _columns_error(f"columns: no column {column!r} for the {field}", field, near, found, where)


def _others(found: Collection[str], matched: Mapping[str, str], table: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The one column that no other field claims, worth proposing; or nothing."""
    known = {name for names in table.values() for name in names}
    left = [column for column in found if column not in matched.values() and plain_name(column) not in known]
    return left if len(left) == 1 else []


def _columns_error(what: str, field: str, candidates: Collection[str], found: Collection[str], where: str) -> DataError:
    column = next(iter(candidates), "YOUR_COLUMN")
    listed = ", ".join(short(column) for column in list(found)[:40]) or "none"
    return DataError(what, where=where, found=f"the columns {listed}", hint=f"say which: `columns: {{{field}: {short(column)}}}`")


def check_label_map(labels: Mapping[str, str], where: str) -> dict[str, Label]:
    """The user's label map in plain form. Raises DataError when a value is not a label."""
    plain: dict[str, Label] = {}
    for theirs, ours in labels.items():
        if plain_name(ours) not in set(Label):
            raise DataError(f"labels: {theirs!r}", where=where, expected="malicious or benign", found=repr(ours))
        plain[_label_word(theirs)] = Label(plain_name(ours))
    return plain


def read_label(value: Any, column: str, labels: Mapping[str, Label]) -> Label | None:
    """The label that `value` of `column` means, or None when it is unknown. Numbers and words, any case.

    labels: the user's map in plain form, see `check_label_map`; it wins.
    """
    word, column = _label_word(value), plain_name(column)
    if word in labels:
        return labels[word]
    if word in LABEL_WORDS:
        return LABEL_WORDS[word]
    if column in UNDIRECTED:
        return None
    is_flag = column.startswith("is_") or column in LABEL_WORDS or column in INVERTED_FLAGS
    true = word in TRUE_WORDS or (is_flag and word == "yes")
    false = word in FALSE_WORDS or (is_flag and word == "no")
    if true == false:
        return None
    return Label.MALICIOUS if true != (column in INVERTED_FLAGS) else Label.BENIGN


def unknown_label_line(value: Any, column: str) -> str:
    """What to say about a label value that `read_label` does not know."""
    accepted = "malicious or benign, unsafe or safe, harmful or harmless, jailbreak, injection, 1 or 0, true or false"
    if plain_name(column) in UNDIRECTED:
        accepted = "malicious or benign, unsafe or safe; not numbers, which could mean either"
    hint = "map others with `labels: {THEIR_VALUE: malicious}`"
    return f"expected a label in column {short(column)} ({accepted}), found {short(value)} ({hint})"


def _label_word(value: Any) -> str:
    # A column of numbers with gaps comes as 1.0 and 0.0.
    return re.sub(r"^(-?\d+)\.0$", r"\1", plain_name(str(value)))


def short(value: Any) -> str:
    """A value or a column's name as it may stand in a message."""
    # A long value is most likely a prompt in the wrong column, and prompts stay out of messages.
    text = str(value)
    if not text.strip():
        return "an empty text"
    return (repr(value) if not isinstance(value, str) else text) if len(text) <= 40 else f"a text of {len(text):,} characters"
