"""For agents on FastAPI, Starlette or any other ASGI framework:

app.add_middleware(GuardMiddleware, guard=Guard.load("runs/guard"), paths=["/chat"])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from starlette.datastructures import Headers

from guardtrain.errors import ServeError
from guardtrain.serve.limits import read_body, replayed
from guardtrain.serve.middleware.common import Checks, Gatekeeper, refusal_of
from guardtrain.serve.refusals import Refusal
from guardtrain.serve.settings import MEBIBYTE
from guardtrain.serve.untrusted import NAME, Piece, in_anything, in_messages, piece, texts_in
from guardtrain.serve.verdict import Failure

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY_VIOLATION = 1008


class GuardMiddleware:
    """Judges what comes in before the application sees it: query, body, and each message of a WebSocket.

    guard: a local one, or the URL of a running server (with api_key). paths: prefixes; everything without. fails_open: failures
    that let a request pass. read: the untrusted texts of a JSON body; by default user and tool turns of `messages`, and every
    other text but single names. A block is a 400 with the code content_blocked; a guard that fails has the server's codes.
    """

    def __init__(
        self,
        app: ASGIApp,
        guard: Checks | str,
        *,
        api_key: str | None = None,
        paths: Collection[str] = ("/",),
        fails_open: Collection[Failure] = (),
        read: Callable[[Any], list[Piece]] | None = None,
        max_body_bytes: int = 4 * MEBIBYTE,
        timeout_seconds: float = 30.0,
    ) -> None:
        self.app, self.paths, self.read = app, tuple(paths), read or untrusted_texts
        self.max_body_bytes, self.timeout_seconds = max_body_bytes, timeout_seconds
        self.gatekeeper = Gatekeeper(guard, api_key=api_key, fails_open=fails_open)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"} or not scope["path"].startswith(self.paths):
            await self.app(scope, receive, send)
            return
        try:
            await self.gatekeeper.aadmit(_in_query(scope))
            is_http = scope["type"] == "http"
            checked = await self._checked(scope, receive) if is_http else self._watched(receive, send)
        except Refusal as refusal:
            await _refuse(refusal, scope, receive, send)
        except ServeError as error:
            await _refuse(refusal_of(error), scope, receive, send)
        else:
            await self.app(scope, checked, send)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """The request's body, judged, to be read again."""
        body = await read_body(scope, receive, max_bytes=self.max_body_bytes, timeout_seconds=self.timeout_seconds)
        if body is None:
            return receive  # the client is gone, which the application will be told as well
        await self.gatekeeper.aadmit(self._pieces(body, Headers(scope=scope).get("content-type", "")))
        return replayed(body, receive)

    def _watched(self, receive: Receive, send: Send) -> Receive:
        """Messages of a WebSocket, each judged as it comes: a block closes it."""

        async def watched() -> Message:
            message = await receive()
            if message["type"] != "websocket.receive":
                return message
            text, data = message.get("text"), message.get("bytes")
            try:
                await self.gatekeeper.aadmit([piece("message", "user", text)] if text else self._pieces(data or b"", ""))
            except ServeError:
                await send({"type": "websocket.close", "code": POLICY_VIOLATION})
                return {"type": "websocket.disconnect", "code": POLICY_VIOLATION}
            return message

        return watched

    def _pieces(self, body: bytes, content_type: str) -> list[Piece]:
        kind = content_type.partition(";")[0].strip().lower()
        if not body:
            return []
        try:
            text = body.decode("utf-8")
            if kind == "application/x-www-form-urlencoded":
                return in_anything([value for _, value in parse_qsl(text, keep_blank_values=True)])
            if kind.startswith("text/"):
                return [piece("body", "user", text)]
            return self.read(json.loads(text))
        except (ValueError, RecursionError):
            return [Piece("body", "user", None)]


def untrusted_texts(body: Any) -> list[Piece]:
    """Of a JSON body: user and tool turns of `messages`, one by one, and every other text but single names, together."""
    if not isinstance(body, Mapping):
        return in_anything(body)
    messages = body.get("messages")
    if not (isinstance(messages, list) and all(isinstance(each, Mapping) for each in messages)):
        return in_anything(body)
    rest = texts_in({key: value for key, value in body.items() if key != "messages"})
    return [*in_messages(messages), *in_anything([text for text in rest if not NAME.fullmatch(text)])]


def _in_query(scope: Scope) -> list[Piece]:
    values = [value for _, value in parse_qsl(scope["query_string"].decode("latin-1"), errors="replace")]
    return in_anything([value for value in values if not NAME.fullmatch(value)], "query")


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        return
    await refusal.response()(scope, receive, send)
