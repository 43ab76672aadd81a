"""Rows of public benchmarks whose labels are no plain column: one small pure function for each set.

Each takes a row as the set has it and gives it in our names (prompt, label, and id, category where there are any), or says
in a few words why the row is none of the test: a benchmark's own rules leave some out, and none goes uncounted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from guardtrain.data.problems import Problem
from guardtrain.data.records import Record, read_records
from guardtrain.errors import DataError
from guardtrain.types import Label

Values = Mapping[str, Any]
MODERATION_CATEGORIES = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
AEGIS_VOTES = tuple(f"labels_{number}" for number in range(5))
BIPIA_CONTEXTS, BIPIA_ATTACKS = "email/test.jsonl", "text_attack_test.json"
BIPIA_POSITIONS = ("end", "start", "middle")


def openai_moderation_row(values: Values) -> dict[str, Any]:
    """Malicious when any of the eight categories is 1; a category that was not annotated is absent or null, and counts as 0."""
    hits = [name for name in MODERATION_CATEGORIES if str(values.get(name)) in {"1", "1.0"}]
    return {"prompt": values["prompt"], "label": _label(bool(hits)), "category": ",".join(hits)}


def aegis_1_row(values: Values) -> dict[str, Any] | str:
    """The majority of up to five annotators; a tie, and the label "Needs Caution", are malicious. User messages only."""
    if values["text_type"] != "user_message":
        return "not a user message alone"
    votes = [vote.strip() for name in AEGIS_VOTES if isinstance(vote := values.get(name), str) and vote.strip()]
    if not votes:
        return "no annotation"
    num_safe = votes.count("Safe")
    return {"prompt": values["text"], "label": _label(2 * num_safe <= len(votes)), "id": values.get("id")}


def aegis_2_row(values: Values) -> dict[str, Any] | str:
    """The label of the prompt, not of the response; prompts that the card says to fetch elsewhere have no text."""
    if values["prompt"] == "REDACTED":
        return "redacted prompt"
    if not values["prompt_label"]:
        return "no label of the prompt"
    category = values.get("violated_categories")
    return {"prompt": values["prompt"], "label": values["prompt_label"], "id": values.get("id"), "category": category}


def wildguard_row(values: Values) -> dict[str, Any] | str:
    """The label of the prompt, not of the response; annotators did not agree on some."""
    if not values["prompt_harm_label"]:
        return "no agreed label of the prompt"
    return {"prompt": values["prompt"], "label": values["prompt_harm_label"], "category": values.get("subcategory")}


def xstest_row(values: Values) -> dict[str, Any]:
    """Malicious when the type is a contrast type: older files have no label column."""
    kind = str(values["type"])
    row_id = values.get("id_v2", values.get("id"))
    return {"prompt": values["prompt"], "label": _label(kind.startswith("contrast")), "id": row_id, "category": kind}


def harmbench_row(values: Values) -> dict[str, Any] | str:
    """Behaviours with the context they speak of below them; upstream's CSV, or the columns of its copy on Hugging Face."""
    if values.get("FunctionalCategory") == "copyright":
        return "copyright behaviour"
    context = values.get("ContextString", values.get("context"))
    prompt = values["Behavior"] if "Behavior" in values else values["prompt"]
    category = values.get("SemanticCategory", values.get("category"))
    return {
        "prompt": f"{prompt}\n\n{context}" if isinstance(prompt, str) and context else prompt,
        "label": Label.MALICIOUS,
        "id": values.get("BehaviorID"),
        "category": category,
    }


def bipia_records(folder: Path) -> Iterator[Record | Problem]:
    """Emails as they are, and each with each attack planted at its end, its start or near its middle, in turn.

    folder: `benchmark/` of the repository. Rows are in our names. Positions take turns over emails and attacks, so that the
    rows are the same every time; upstream builds all three of each pair and draws the middle at random.
    Raises DataError when the file of attacks is not as expected.
    """
    attacks = list(_bipia_attacks(folder / BIPIA_ATTACKS))
    for row, item in enumerate(read_records(str(folder / BIPIA_CONTEXTS))):
        if isinstance(item, Problem):
            yield item
            continue
        context = item.values.get("context")
        if not isinstance(context, str):
            found = ", ".join(item.values)
            raise DataError("no email", where=item.where, expected="a text in column context", found=f"columns {found}")
        email_id = f"email-{row}"
        yield Record(item.where, {"prompt": context, "label": Label.BENIGN, "id": email_id})
        for number, (name, attack) in enumerate(attacks):
            position = BIPIA_POSITIONS[(row + number) % len(BIPIA_POSITIONS)]
            planted = {
                "prompt": plant(context, attack, position),
                "label": Label.MALICIOUS,
                "id": f"{email_id}-{name}-{position}",
                "category": name.rpartition("-")[0],
            }
            yield Record(f"{item.where}#{name}", planted)


def plant(context: str, attack: str, position: str) -> str:
    """`attack` on a line of its own at the end or the start of `context`, or before the sentence nearest to its middle."""
    if position == "end":
        return f"{context}\n{attack}"
    if position == "start":
        return f"{attack}\n{context}"
    starts = [match.end() for match in re.finditer(r"[.!?]\s+|\n+", context)] or [0]
    place = min(starts, key=lambda start: abs(start - len(context) / 2))
    return f"{context[:place]}\n{attack}\n{context[place:]}"


def _bipia_attacks(path: Path) -> Iterator[tuple[str, str]]:
    expected = "an object of lists of texts"
    try:
        attacks = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("no attacks", where=str(path), expected=expected, found=str(error)) from error
    if not isinstance(attacks, dict):
        raise DataError("no attacks", where=str(path), expected=expected, found=type(attacks).__name__)
    for name, texts in attacks.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError("no attacks", where=f"{path}: {name}", expected=expected, found=type(texts).__name__)
        yield from ((f"{name}-{number}", text) for number, text in enumerate(texts))


def _label(is_malicious: bool) -> Label:
    return Label.MALICIOUS if is_malicious else Label.BENIGN
