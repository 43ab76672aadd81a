"""`/v1/chat/completions` for clients that know nothing of a guard: checked here, answered by the upstream.

What goes on is the JSON that was read, written anew: two readers of one body cannot find different things in it.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from guardtrain.serve.access import check_count, gate_of, headers_of
from guardtrain.serve.gate import Gate, Judged
from guardtrain.serve.record import record_of
from guardtrain.serve.refusals import Refusal, of_failure
from guardtrain.serve.untrusted import Piece, in_anything, in_messages
from guardtrain.serve.upstream import EVENT_STREAM, Upstream

BLOCKED_CODE, BLOCKED_TEXT = "content_blocked", "The guard has blocked this request."

router = APIRouter()


class ChatRequest(BaseModel):
    """OpenAI's chat request; what is not named here goes on as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None


def upstream_of(request: Request) -> Upstream:
    """Of the application that answers. Raises Refusal where there is none."""
    upstream = request.app.state.upstream
    if not isinstance(upstream, Upstream):
        raise Refusal(404, "no_upstream", "This server has no upstream: it judges texts and answers none (--upstream URL).")
    return upstream


@router.post("/v1/chat/completions")
async def complete(
    body: ChatRequest,
    request: Request,
    gate: Annotated[Gate, Depends(gate_of)],
    upstream: Annotated[Upstream, Depends(upstream_of)],
) -> Response:
    """Check untrusted turns, then let the upstream answer. A block is a completion with finish_reason content_filter."""
    payload = _payload(body)
    pieces = pieces_of(body, upstream.settings.roles)
    check_count(len(pieces), gate.settings, "messages")
    record = record_of(request.scope)
    record.judged = await gate.judge(pieces, stops=True)
    blocked = next((judged for judged in record.judged if judged.blocks), None)
    headers = headers_of(gate, record.judged)
    if blocked is None or gate.settings.is_shadow:
        return await upstream.send("POST", "/chat/completions", request.headers, payload, headers)
    answer = _block(blocked, body, headers, upstream.settings.block_status)
    record.code = BLOCKED_CODE
    return answer


@router.get("/v1/models")
async def models(request: Request, upstream: Annotated[Upstream, Depends(upstream_of)]) -> Response:
    """The upstream's list of models."""
    return await upstream.send("GET", "/models", request.headers, None, {})


def pieces_of(body: ChatRequest, roles: frozenset[str]) -> list[Piece]:
    """What is to be judged, the newest turn first: it is the one that the guard has not seen.

    documents: vLLM and others write them into the prompt (2026-11).
    """
    documents = in_anything((body.model_extra or {}).get("documents"), "documents")
    return [*reversed(in_messages(body.messages, roles)), *documents]


def _payload(body: ChatRequest) -> bytes:
    try:
        return json.dumps(body.model_dump(exclude_unset=True), allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "invalid_request", "The request holds a number that JSON does not know.") from error


def _block(judged: Judged, body: ChatRequest, headers: dict[str, str], block_status: int) -> Response:
    """The answer to an attack. Raises Refusal where there is no verdict: an outage does not look like one."""
    if judged.verdict.failure is not None:
        raise of_failure(judged.verdict.failure, judged.piece.where, judged.to_json())
    if block_status == 400:
        return Refusal(400, BLOCKED_CODE, BLOCKED_TEXT, param=judged.piece.where, details=judged.to_json()).response(headers)
    if body.stream:
        return Response(_events(judged, body.model), media_type=EVENT_STREAM, headers=headers)
    message = {"role": "assistant", "content": BLOCKED_TEXT, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "content_filter", "logprobs": None}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    head = _head(judged, "chat.completion", body.model)
    return JSONResponse({**head, "choices": [choice], "usage": usage, "guardtrain": judged.to_json()}, headers=headers)


def _events(judged: Judged, model: str | None) -> bytes:
    """The same as a stream: its text, its end, and the end of the stream."""
    said = {"index": 0, "delta": {"role": "assistant", "content": BLOCKED_TEXT}, "finish_reason": None, "logprobs": None}
    end = {"index": 0, "delta": {}, "finish_reason": "content_filter", "logprobs": None}
    head = _head(judged, "chat.completion.chunk", model)
    chunks = [{**head, "choices": [said]}, {**head, "choices": [end], "guardtrain": judged.to_json()}]
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def _head(judged: Judged, kind: str, model: str | None) -> dict[str, Any]:
    return {"id": f"chatcmpl-{judged.id}", "object": kind, "created": int(time.time()), "model": model or ""}
