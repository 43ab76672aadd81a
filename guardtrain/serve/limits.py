"""How much a request may hold and how long it may take to arrive; and an end of the work for clients that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from guardtrain.serve.record import record_of
from guardtrain.serve.refusals import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# After a body that is too large has been refused: many clients read the answer only once they have sent all.
LINGER_BYTES, LINGER_SECONDS = 256 * 2**20, 5.0


class Limits:
    """Reads the whole body before anything else runs, at most `max_body_bytes` in `timeout_seconds`.

    Behind it runs the application, which is cancelled in the moment its client hangs up.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, timeout_seconds: float) -> None:
        self.app, self.max_body_bytes, self.timeout_seconds = app, max_body_bytes, timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = await read_body(scope, receive, max_bytes=self.max_body_bytes, timeout_seconds=self.timeout_seconds)
        if body is None:
            record_of(scope).is_gone = True
            return
        is_answered = False

        async def noted(message: Message) -> None:
            nonlocal is_answered
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        gone = asyncio.ensure_future(_hung_up(receive))
        work = asyncio.ensure_future(self.app(scope, replayed(body, lambda: _end_of(gone)), noted))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not (work.done() or is_answered):  # a server says the same of a client that has its whole answer
                record_of(scope).is_gone = True
                return
            await work
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({gone, work})


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int, timeout_seconds: float) -> bytes | None:
    """All of it; None where the client is gone. Raises Refusal for too much, and for what is too long in coming."""
    declared = Headers(scope=scope).get("content-length", "")
    is_too_large = declared.isdecimal() and int(declared[:20]) > max_bytes
    body, is_whole = bytearray(), False
    try:
        async with asyncio.timeout(timeout_seconds):
            while not (is_whole or is_too_large):
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                is_whole, is_too_large = not message.get("more_body", False), len(body) > max_bytes
    except TimeoutError as error:
        raise Refusal(408, "request_timeout", f"The request did not arrive within {timeout_seconds:g} seconds.") from error
    if is_too_large:
        if not is_whole and "expect" not in Headers(scope=scope):
            await _drained(receive)
        raise Refusal(413, "body_too_large", f"A request may hold {max_bytes:,} bytes at most.")
    return bytes(body)


def replayed(body: bytes, then: Callable[[], Awaitable[Message]]) -> Receive:
    """A `receive` that gives the body once, and then whatever `then` brings."""
    is_given = False

    async def receive() -> Message:
        nonlocal is_given
        if is_given:
            return await then()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _drained(receive: Receive) -> None:
    """Let go of what is still coming, without keeping it: a connection closed before takes the answer with it."""
    dropped = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while dropped < LINGER_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                dropped += len(message.get("body", b""))
    except TimeoutError:
        return


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end_of(gone: asyncio.Future[None]) -> Message:
    await asyncio.wait({gone})
    return {"type": "http.disconnect"}
