"""For programs on the `openai` client: its transport, so that no method of the client goes round the guard.

client = OpenAI(http_client=guarded_client(Guard.load("runs/guard")))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import httpx2

from guardtrain.errors import ServeError
from guardtrain.serve.middleware.common import Checks, Gatekeeper, refusal_of
from guardtrain.serve.untrusted import Piece, in_anything, in_input, in_messages
from guardtrain.serve.verdict import Failure


def guarded_client(
    guard: Checks | str, *, api_key: str | None = None, fails_open: Collection[Failure] = (), **options: Any
) -> httpx2.Client:
    """For `OpenAI(http_client=…)`. A blocked request is not sent: the client raises BadRequestError, code content_blocked.

    A guard that gives no verdict looks as its server would: RateLimitError or InternalServerError, tried again as usual.
    guard: a local one, or the URL of a running server (with api_key). fails_open: failures that let a request pass.
    options: of httpx2.Client.
    """
    gatekeeper = Gatekeeper(guard, api_key=api_key, fails_open=fails_open)
    return httpx2.Client(transport=_Transport(gatekeeper, httpx2.HTTPTransport()), **options)


def guarded_async_client(
    guard: Checks | str, *, api_key: str | None = None, fails_open: Collection[Failure] = (), **options: Any
) -> httpx2.AsyncClient:
    """The same for `AsyncOpenAI(http_client=…)`."""
    gatekeeper = Gatekeeper(guard, api_key=api_key, fails_open=fails_open)
    return httpx2.AsyncClient(transport=_AsyncTransport(gatekeeper, httpx2.AsyncHTTPTransport()), **options)


class _Transport(httpx2.BaseTransport):
    def __init__(self, gatekeeper: Gatekeeper, inner: httpx2.BaseTransport) -> None:
        self.gatekeeper, self.inner = gatekeeper, inner

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            self.gatekeeper.admit(pieces_of(request.url.path, request.headers, request.read()))
        except ServeError as error:
            return _refused(error)
        return self.inner.handle_request(request)

    def close(self) -> None:
        self.inner.close()


class _AsyncTransport(httpx2.AsyncBaseTransport):
    def __init__(self, gatekeeper: Gatekeeper, inner: httpx2.AsyncBaseTransport) -> None:
        self.gatekeeper, self.inner = gatekeeper, inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            await self.gatekeeper.aadmit(pieces_of(request.url.path, request.headers, await request.aread()))
        except ServeError as error:
            return _refused(error)
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


def pieces_of(path: str, headers: Mapping[str, str], body: bytes) -> list[Piece]:
    """The untrusted texts of a request to OpenAI's API.

    Of chats, responses, conversations and completions what their turns say; of endpoints that this module has never heard of
    every text. Bodies that are not JSON (files, sound) are not read.
    """
    is_json = headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
    if not body or not is_json or path.endswith(WRITES_NOTHING):
        return []
    sent = json.loads(body)
    reader = next((reader for end, reader in READERS.items() if path.endswith(end)), in_anything)
    return reader(sent) if isinstance(sent, Mapping) else [Piece("body", "user", None)]


def _refused(error: ServeError) -> httpx2.Response:
    response = refusal_of(error).response()
    return httpx2.Response(response.status_code, headers=dict(response.headers), content=bytes(response.body))


def _of_chat(sent: Mapping[str, Any]) -> list[Piece]:
    return in_messages(sent.get("messages", []))


def _of_response(sent: Mapping[str, Any]) -> list[Piece]:
    template = sent.get("prompt")  # one that is stored there, with what stands for its variables
    variables = template.get("variables") if isinstance(template, Mapping) else None
    return [*in_input(sent.get("input")), *in_anything(variables, "prompt.variables")]


def _of_conversation(sent: Mapping[str, Any]) -> list[Piece]:
    return in_input(sent.get("items"))


def _of_completion(sent: Mapping[str, Any]) -> list[Piece]:
    return in_anything(sent.get("prompt"), "prompt")


READERS: dict[str, Callable[[Mapping[str, Any]], list[Piece]]] = {
    "/chat/completions": _of_chat,
    "/completions": _of_completion,
    "/responses": _of_response,
    "/conversations": _of_conversation,
    "/items": _of_conversation,
}
WRITES_NOTHING = ("/embeddings", "/moderations")  # no model reads these as its instructions
