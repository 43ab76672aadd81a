"""The server's application: endpoints over one gate, behind layers that name, authenticate and bound each request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from guardtrain import __version__
from guardtrain.serve import litellm, moderations, page, proxy
from guardtrain.serve.access import gate_of
from guardtrain.serve.auth import Authentication
from guardtrain.serve.gate import Gate
from guardtrain.serve.guard import Guard
from guardtrain.serve.limits import Limits
from guardtrain.serve.metrics import Metrics
from guardtrain.serve.reasons import Reasons
from guardtrain.serve.record import Lifecycle, Recorder
from guardtrain.serve.refusals import Refusal
from guardtrain.serve.settings import ServeSettings
from guardtrain.serve.upstream import Upstream

logger = logging.getLogger(__name__)
router = APIRouter()


def create_app(guard: Guard, settings: ServeSettings | None = None, lifecycle: Lifecycle | None = None) -> FastAPI:
    """An ASGI application around `guard`, which it starts and closes. lifecycle: for whoever ends the server."""
    settings = settings or ServeSettings()
    app = FastAPI(title="guardtrain", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan)
    metrics, state = Metrics(guard), app.state
    state.lifecycle = lifecycle or Lifecycle()
    state.gate = Gate(guard, settings, metrics, Reasons(guard), state.lifecycle)
    state.upstream = Upstream(settings.upstream, metrics, api_key=settings.api_key) if settings.upstream else None
    for each in (router, moderations.router, litellm.router, proxy.router, page.router):
        app.include_router(each)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    # The last one added is the outermost.
    app.add_middleware(Limits, max_body_bytes=settings.max_body_bytes, timeout_seconds=settings.timeout_seconds)
    app.add_middleware(Authentication, api_key=settings.api_key, metrics=metrics)
    app.add_middleware(Recorder, metrics=metrics, lifecycle=state.lifecycle, logs_prompts=settings.logs_prompts)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gate, upstream = app.state.gate, app.state.upstream
    starting = asyncio.create_task(_start(gate.guard, app.state.lifecycle))
    try:
        yield
    finally:
        starting.cancel()
        gate.reasons.close()
        await gate.guard.aclose()
        if upstream is not None:
            await upstream.aclose()


async def _start(guard: Guard, lifecycle: Lifecycle) -> None:
    """Beside the server, which answers its probes meanwhile."""
    try:
        await guard.start()
        lifecycle.is_started = True
    except Exception as error:
        lifecycle.failure = error


@router.get("/healthz")
async def health() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readiness(request: Request, gate: Annotated[Gate, Depends(gate_of)]) -> JSONResponse:
    """Whether requests should be sent here: 503 while the model is being loaded or restarted, and once the end has begun."""
    is_ready = gate.guard.is_ready and not request.app.state.lifecycle.is_draining
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


@router.get("/metrics")
async def figures(gate: Annotated[Gate, Depends(gate_of)]) -> Response:
    """For Prometheus."""
    return Response(gate.metrics.shown(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/reasons/{judged_id}")
async def reason(judged_id: str, gate: Annotated[Gate, Depends(gate_of)]) -> JSONResponse:
    """Why a text was blocked: asked for the first time it is written, 202 until it is there."""
    verdict = gate.reasons.ask(judged_id)
    if verdict is None:
        return JSONResponse({"id": judged_id, "status": "pending"}, 202, {"Retry-After": "1"})
    return JSONResponse({"id": judged_id, **verdict.to_json()})


async def _invalid(request: Request, error: Any) -> NoReturn:
    """A body of another form. The framework's own words would repeat what was sent."""
    first = error.errors()[0]
    where = str(first["loc"][1])[:100] if len(first["loc"]) > 1 and first["type"] != "json_invalid" else None
    what = "not valid JSON in UTF-8" if first["type"] == "json_invalid" else str(first["msg"])
    raise Refusal(400, "invalid_request", f"{where or 'body'}: {what}", param=where)


async def _refused(request: Request, error: Any) -> NoReturn:
    """What the framework refuses: paths and methods that are not here, bodies that cannot be decoded."""
    codes = {404: "not_found", 405: "method_not_allowed", 400: "invalid_request"}
    raise Refusal(error.status_code, codes.get(error.status_code, "refused"), str(error.detail))
