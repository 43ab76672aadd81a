"""LiteLLM's generic guardrail endpoint, as its documentation of late 2026 describes it.

Only a parsed answer binds LiteLLM: a proxy that is told to fail open lets 502, 503 and 504 pass. A guard without a verdict
therefore answers BLOCKED with status 200 here, and says why.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from guardtrain.serve.access import check_count, gate_of, headers_of
from guardtrain.serve.gate import Gate, Judged
from guardtrain.serve.record import LITELLM, record_of
from guardtrain.serve.untrusted import Piece, in_messages, piece, texts_in

router = APIRouter()


class GuardrailRequest(BaseModel):
    """What LiteLLM sends. texts: of all turns, whoever wrote them; structured_messages: the same turns with their roles."""

    model_config = ConfigDict(extra="ignore")

    input_type: Literal["request", "response"] = "request"
    texts: list[str] | None = None
    images: list[str] | None = None
    structured_messages: list[dict[str, Any]] | None = None
    litellm_call_id: str | None = None


class GuardrailResponse(BaseModel):
    """action: BLOCKED, or NONE. blocked_reason: for people, with each BLOCKED."""

    action: Literal["BLOCKED", "NONE"]
    blocked_reason: str | None = None


@router.post(LITELLM, response_model=GuardrailResponse)
async def guardrail(body: GuardrailRequest, request: Request, gate: Annotated[Gate, Depends(gate_of)]) -> JSONResponse:
    """Judge what LiteLLM is about to send to a model, or has got from one."""
    pieces = pieces_of(body)
    check_count(len(pieces), gate.settings, "texts")
    record = record_of(request.scope)
    record.judged = await gate.judge(pieces, stops=True)
    blocked = next((judged for judged in record.judged if judged.blocks), None)
    headers = headers_of(gate, record.judged)
    if blocked is None or gate.settings.is_shadow:
        return JSONResponse({"action": "NONE"}, headers=headers)
    return JSONResponse({"action": "BLOCKED", "blocked_reason": _said(blocked)}, headers=headers)


def pieces_of(body: GuardrailRequest) -> list[Piece]:
    """Untrusted turns where roles are known, and every text that is not word for word one of a trusted turn."""
    messages = body.structured_messages or []
    untrusted = in_messages(messages)
    known = set(texts_in(messages))  # of turns that are judged above, or that the operator vouches for
    texts = [piece(f"texts[{number}]", "user", text) for number, text in enumerate(body.texts or []) if text.strip()]
    images = [Piece(f"images[{number}]", "user", None) for number, _ in enumerate(body.images or [])]
    return [*untrusted, *(each for each in texts if each.text is None or each.text not in known), *images]


def _said(judged: Judged) -> str:
    if judged.verdict.failure is not None:
        return f"The guard gave no verdict ({judged.verdict.failure}), and nothing passes unchecked. Id {judged.id}."
    return f"The guard judges the content malicious. Id {judged.id}."
