"""Who may ask. A wrong key is refused before anything of the request is read, and never fails open."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from guardtrain.serve.refusals import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from guardtrain.serve.metrics import Metrics

# Probes of an orchestrator carry no key, and the page holds nothing but a form.
OPEN = frozenset({"/healthz", "/readyz", "/"})


class Authentication:
    """Asks for `Authorization: Bearer KEY` or `X-API-Key: KEY`; for nothing where api_key is None."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, metrics: Metrics) -> None:
        self.app, self.api_key, self.metrics = app, api_key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.api_key is not None and scope["path"] not in OPEN:
            headers = Headers(scope=scope)
            if not any(is_key(given, self.api_key) for given in (bearer(headers), headers.get("x-api-key"))):
                self.metrics.refused_keys.inc()
                raise Refusal(401, "invalid_api_key", "No valid key: send it as Authorization: Bearer KEY or as X-API-Key.")
        await self.app(scope, receive, send)


def bearer(headers: Headers) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def is_key(given: str | None, expected: str) -> bool:
    """Whether they are equal, in a time that says nothing of where they differ or how long the key is."""
    if given is None:
        return False
    return hmac.compare_digest(*(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, expected)))
