"""The model server behind the proxy: asked once for each request that passed, and every way in which it can fail has a code."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import httpx2
from starlette.responses import Response, StreamingResponse

from guardtrain.serve.auth import bearer, is_key
from guardtrain.serve.refusals import Refusal

if TYPE_CHECKING:
    from starlette.datastructures import Headers

    from guardtrain.serve.metrics import Metrics
    from guardtrain.serve.settings import UpstreamSettings

CONNECT_SECONDS = 5.0
MAX_CONNECTIONS = 1000
_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade"),
}
# Credentials of the client are for this server; the rest describes a body or a connection that is not passed on as it came.
_NOT_FORWARDED = _HOP_BY_HOP | {
    *("authorization", "x-api-key", "api-key", "cookie", "host", "content-length", "content-type", "content-encoding"),
    *("accept-encoding", "expect", "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"),
}
_NOT_RETURNED = _HOP_BY_HOP | {"content-length", "date", "server"}
EVENT_STREAM = "text/event-stream"


class Upstream:
    """Sends requests on. Open it with `async with`."""

    def __init__(self, settings: UpstreamSettings, metrics: Metrics, *, api_key: str | None) -> None:
        self.settings, self.metrics, self._guard_key = settings, metrics, api_key
        timeout = httpx2.Timeout(settings.timeout_seconds, connect=CONNECT_SECONDS)
        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=100)
        self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False, trust_env=False)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def send(
        self, method: str, path: str, headers: Headers, body: bytes | None, extra_headers: Mapping[str, str]
    ) -> Response:
        """The upstream's answer, whatever its status; events of a stream go on one by one. Raises Refusal where there is none."""
        stack = AsyncExitStack()
        request = self._client.build_request(method, self.settings.url + path, headers=self._forwarded(headers), content=body)
        try:
            answer = await self._client.send(request, stream=True)
            stack.push_async_callback(answer.aclose)
            returned = [*_kept(answer.headers.multi_items(), _NOT_RETURNED), *extra_headers.items()]
            if answer.headers.get("content-type", "").startswith(EVENT_STREAM):
                return _with_headers(StreamingResponse(self._events(answer, stack.pop_all()), answer.status_code), returned)
            return _with_headers(Response(b"".join([part async for part in answer.aiter_raw()]), answer.status_code), returned)
        except httpx2.TransportError as error:
            raise self._refusal(error) from error
        finally:
            await stack.aclose()

    def _forwarded(self, headers: Headers) -> list[tuple[str, str]]:
        kept = _kept(headers.items(), _NOT_FORWARDED | _named(headers.get("connection", "")))
        kept += [("content-type", "application/json"), ("accept-encoding", "identity")]
        if self.settings.key is not None:
            return [*kept, ("authorization", f"Bearer {self.settings.key}")]
        own = headers.get("authorization")
        is_ours = self._guard_key is not None and is_key(bearer(headers), self._guard_key)
        return [*kept, ("authorization", own)] if own and self.settings.forwards_authorization and not is_ours else kept

    async def _events(self, answer: httpx2.Response, stack: AsyncExitStack) -> AsyncIterator[bytes]:
        """The stream as it comes. One that breaks off ends in an event with an error, without which it would look complete."""
        async with stack:
            try:
                async for part in answer.aiter_raw():
                    yield part
            except httpx2.TransportError as error:
                if "content-encoding" in answer.headers:
                    raise
                yield b"\n\ndata: " + bytes(self._refusal(error).response().body) + b"\n\n"

    def _refusal(self, error: httpx2.TransportError) -> Refusal:
        status, code, message = _said(error)
        self.metrics.upstream_failures.labels(code).inc()
        return Refusal(status, code, message)


def _said(error: httpx2.TransportError) -> tuple[int, str, str]:
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol):
        return 502, "upstream_unreachable", "The model server behind the guard cannot be reached."
    if isinstance(error, httpx2.TimeoutException):
        return 504, "upstream_timeout", "The model server behind the guard did not answer in time."
    return 502, "upstream_cut", "The model server behind the guard broke off its answer."


def _named(connection: str) -> set[str]:
    """Headers that are named as belonging to one connection."""
    return {name.strip().lower() for name in connection.split(",")}


def _kept(headers: Iterable[tuple[str, str]], dropped: set[str]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def _with_headers(response: Any, headers: list[tuple[str, str]]) -> Response:
    """Starlette's constructor takes one header of a name; an upstream may send several."""
    own = [] if isinstance(response, StreamingResponse) else [(b"content-length", str(len(response.body)).encode())]
    response.raw_headers = [*own, *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers)]
    assert isinstance(response, Response)
    return response
