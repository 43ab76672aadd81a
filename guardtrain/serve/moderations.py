"""`/v1/moderations` in OpenAI's form, with this guard's verdict under `guardtrain` in each result."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from guardtrain.serve.access import check_count, gate_of, headers_of
from guardtrain.serve.gate import Gate, Judged
from guardtrain.serve.record import record_of
from guardtrain.serve.refusals import Refusal, of_failure
from guardtrain.serve.untrusted import Piece, in_parts, piece

# A guard judges one thing. OpenAI's own categories are there for clients whose types demand them, and are always false.
_OPENAI = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm"),
    *("self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic"),
)
OURS = "malicious"

router = APIRouter()


class ModerationRequest(BaseModel):
    """input: a text, texts that are judged one by one, or the parts of one text. mode: off, on, both or cascade."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: str | list[str] | list[dict[str, Any]]
    model: str | None = None
    mode: str | None = None


@router.post("/v1/moderations")
async def moderate(body: ModerationRequest, request: Request, gate: Annotated[Gate, Depends(gate_of)]) -> JSONResponse:
    """Judge texts. A text without a verdict ends the request with an error, except where its failure may pass."""
    inputs = _inputs(body.input)
    mode = _mode(gate, body.mode)
    pieces = [each for of_one in inputs for each in of_one]
    check_count(len(pieces), gate.settings, "input")
    record = record_of(request.scope)
    record.judged = await gate.judge(pieces, mode=mode)
    _refuse_failures(gate, record.judged)
    results, rest = [], iter(record.judged)
    for of_one in inputs:
        judged = [next(rest) for _ in of_one]
        results.append(_result(gate, next((each for each in judged if each.blocks), judged[0])))
    answer = {"id": f"modr-{record.id}", "model": gate.guard.name, "results": results}
    return JSONResponse(answer, headers=headers_of(gate, record.judged))


def _inputs(given: str | list[str] | list[dict[str, Any]]) -> list[list[Piece]]:
    """The pieces of each result."""
    if isinstance(given, str):
        return [[piece("input", "user", given)]]
    if not given:
        raise Refusal(400, "invalid_request", "input: expected at least one text, found none.", param="input")
    if isinstance(given[0], dict):
        return [in_parts(given, "input") or [piece("input", "user", "")]]
    return [[piece(f"input[{number}]", "user", str(text))] for number, text in enumerate(given)]


def _mode(gate: Gate, asked: str | None) -> str | None:
    if asked is not None and gate.lifecycle.is_started and asked not in gate.guard.modes:
        message = f"mode: expected one of {', '.join(gate.guard.modes)}."
        raise Refusal(400, "unknown_mode", message, param="mode")
    return asked


def _refuse_failures(gate: Gate, judged: list[Judged]) -> None:
    for each in judged:
        if each.verdict.failure is not None and each.blocks and not gate.settings.is_shadow:
            raise of_failure(each.verdict.failure, each.piece.where, each.to_json())


def _result(gate: Gate, judged: Judged) -> dict[str, Any]:
    is_flagged = judged.blocks and not gate.settings.is_shadow
    p_malicious = judged.verdict.p_malicious
    score = {} if p_malicious is None else {OURS: p_malicious}  # no probability is made up where none was fitted
    return {
        "flagged": is_flagged,
        "categories": {**dict.fromkeys(_OPENAI, False), OURS: is_flagged},
        "category_scores": {**dict.fromkeys(_OPENAI, 0.0), **score},
        "category_applied_input_types": {**{name: [] for name in _OPENAI}, OURS: ["text"]},
        "guardtrain": _ours(gate, judged),
    }


def _ours(gate: Gate, judged: Judged) -> dict[str, Any]:
    ours = {**judged.verdict.to_json(), "id": judged.id, "blocks": judged.blocks, "failed_open": judged.failed_open}
    is_later = judged.id in gate.reasons
    return {**ours, "shadow": gate.settings.is_shadow, "reason_later": f"/v1/reasons/{judged.id}" if is_later else None}
