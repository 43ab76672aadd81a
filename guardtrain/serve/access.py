"""What endpoints share: the gate, the headers of an answer, and bounds on what one request may ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import Request

from guardtrain.serve.gate import Gate, Judged
from guardtrain.serve.refusals import Refusal

if TYPE_CHECKING:
    from guardtrain.serve.settings import ServeSettings

DECISION_HEADER, SHADOW_HEADER = "X-Guardtrain-Decision", "X-Guardtrain-Shadow"


def gate_of(request: Request) -> Gate:
    """Of the application that answers."""
    gate = request.app.state.gate
    assert isinstance(gate, Gate)
    return gate


def check_count(count: int, settings: ServeSettings, where: str) -> None:
    """Raise Refusal for more texts than one request may hold."""
    if count > settings.max_texts:
        message = f"{where}: expected at most {settings.max_texts:,} texts in one request, found {count:,}."
        raise Refusal(413, "too_many_texts", message, param=where)


def headers_of(gate: Gate, judged: Sequence[Judged]) -> dict[str, str]:
    """What an answer says of the verdict without its body being read."""
    is_blocked = any(each.blocks for each in judged)
    if is_blocked and gate.settings.is_shadow:
        return {SHADOW_HEADER: "would-block", DECISION_HEADER: "passed"}
    if is_blocked:
        return {DECISION_HEADER: "blocked"}
    return {DECISION_HEADER: "failed-open" if any(each.failed_open for each in judged) else "passed"}
