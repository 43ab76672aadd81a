"""One line and one count for every request, and what a server knows of its own end."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders

from guardtrain.serve.logs import described, entry
from guardtrain.serve.refusals import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from guardtrain.serve.gate import Judged
    from guardtrain.serve.metrics import Metrics

ID_HEADER = "X-Guardtrain-Id"
# What may be asked of a server that is not ready, or no longer.
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
ENDPOINTS = PROBES | {"/", "/openapi.json", "/v1/moderations", "/v1/chat/completions", "/v1/models", "/v1/reasons/{id}"}
# After these nothing else is read from the connection: a body that has not come, or a server that ends.
CLOSING = frozenset({408, 413, 503})
LITELLM = "/beta/litellm_basic_guardrail_api"

logger = logging.getLogger(__name__)


@dataclass
class Lifecycle:
    """Whether the guard is loaded, and whether the server takes new work. failure: why the guard could not be started."""

    is_started: bool = False
    is_draining: bool = False
    in_flight: int = 0
    failure: Exception | None = None


@dataclass
class Record:
    """What is known of one request by its end."""

    id: str
    endpoint: str
    judged: list[Judged] = field(default_factory=list)
    status: int | None = None
    is_gone: bool = False
    code: str | None = None


def record_of(scope: Scope) -> Record:
    """Of the request that is being answered."""
    found = scope["state"]["record"]
    assert isinstance(found, Record)
    return found


class Recorder:
    """The outermost layer: names each request, refuses new work at the end, counts and logs when the answer is out."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, lifecycle: Lifecycle, logs_prompts: bool) -> None:
        self.app, self.metrics, self.lifecycle, self.logs_prompts = app, metrics, lifecycle, logs_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(secrets.token_hex(16), endpoint_of(scope["path"]))
        scope.setdefault("state", {})["record"] = record

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[ID_HEADER] = record.id
            await send(message)

        start = time.perf_counter()
        self._enter(record, 1)
        try:
            await self._answer(scope, receive, noted)
        finally:
            self._enter(record, -1)
            self._note(record, time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        try:
            if self.lifecycle.is_draining and scope["path"] not in PROBES:
                raise Refusal(503, "shutting_down", "This server is ending; ask another.", retry_after=1)
            await self.app(scope, receive, send)
        except Exception as error:
            refusal = _as_refusal(error)
            if record.status is not None:
                raise  # the answer has begun: the connection is cut, which no client takes for its end
            record.code = refusal.code
            is_last = refusal.status in CLOSING
            await refusal.response({"Connection": "close"} if is_last else None)(scope, receive, send)

    def _enter(self, record: Record, change: int) -> None:
        if record.endpoint not in PROBES:
            self.lifecycle.in_flight += change
            self.metrics.in_flight.inc(change)

    def _note(self, record: Record, seconds: float) -> None:
        self.metrics.requests.labels(record.endpoint, str(record.status or "none")).inc()
        self.metrics.request_seconds.labels(record.endpoint).observe(seconds)
        if record.is_gone:
            self.metrics.clients_gone.inc()
        if record.endpoint in PROBES:
            return
        fields: dict[str, Any] = {"request": record.id, "endpoint": record.endpoint, "status": record.status}
        fields |= {"code": record.code, "seconds": round(seconds, 4), "client_gone": record.is_gone}
        fields["checks"] = [entry(judged, with_prompt=self.logs_prompts) for judged in record.judged]
        is_open = any(judged.failed_open for judged in record.judged)
        level, event = (logging.WARNING, "failed open") if is_open else (logging.INFO, "request")
        logger.log(level, event, extra={"fields": fields})


def endpoint_of(path: str) -> str:
    """The endpoint of a path, for labels: there are few."""
    if path.startswith("/v1/reasons/"):
        return "/v1/reasons/{id}"
    return path if path in ENDPOINTS or path == LITELLM else "other"


def _as_refusal(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    logger.error("a fault of this program", extra={"fields": described(error)})
    return Refusal(500, "internal_error", "A fault of the guard's server; nothing passes unchecked.")
