"""What a server is told at its start. Pure data: nothing is opened or read here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from guardtrain.errors import ConfigError
from guardtrain.serve.untrusted import UNTRUSTED
from guardtrain.serve.verdict import Failure

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class UpstreamSettings:
    """The model server behind the proxy.

    url: its base, as an OpenAI client is given it, for example http://localhost:8000/v1. key: of the upstream itself.
    forwards_authorization: the client's own header goes on, unless it holds the guard's key. timeout_seconds: to wait for the
    first byte and between two. roles: whose turns are checked; a role that nobody knows always is.
    block_status: 200 is a completion with finish_reason content_filter, 400 an error with a code.
    """

    url: str
    key: str | None = None
    forwards_authorization: bool = False
    timeout_seconds: float = 60.0
    roles: frozenset[str] = UNTRUSTED
    block_status: Literal[200, 400] = 200


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How requests are answered.

    mode: of the checks, None for the guard's own. api_key: what clients must show, None for nothing.
    fails_open: failures of the guard that let a text pass; each time is counted and logged. is_shadow: everything passes.
    logs_prompts: the texts themselves stand in the log. timeout_seconds: for reading a request, and for checking it.
    drain_seconds: that requests in flight have to end after SIGTERM. max_texts: in one request.
    """

    mode: str | None = None
    api_key: str | None = None
    fails_open: frozenset[Failure] = frozenset()
    is_shadow: bool = False
    logs_prompts: bool = False
    timeout_seconds: float = 10.0
    drain_seconds: float = 30.0
    max_body_bytes: int = 4 * MEBIBYTE
    max_texts: int = 2048
    upstream: UpstreamSettings | None = None


def parse_failures(option: str, text: str | None) -> frozenset[Failure]:
    """Names of failures, separated by commas. Raises ConfigError: nothing else can fail open, a wrong key least of all."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in set(Failure)]:
        raise ConfigError("unknown failure", where=option, expected=", ".join(Failure), found=unknown[0])
    return frozenset(map(Failure, names))


def parse_roles(option: str, text: str) -> frozenset[str]:
    """Names of roles, separated by commas. Raises ConfigError."""
    known = ("user", "tool", "assistant", "system")
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(known):
        raise ConfigError("unknown role", where=option, expected=f"some of {', '.join(known)}", found=text)
    return frozenset(names)


def parse_url(option: str, text: str) -> str:
    """An address without a slash at its end. Raises ConfigError, which repeats no password."""
    try:
        parts = urlsplit(text)
        is_whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        is_whole = False
    if not is_whole or any(mark in text for mark in "@?#"):
        found = None if "@" in text else text
        raise ConfigError("not an address", where=option, expected="for example http://localhost:8000/v1", found=found)
    return text.rstrip("/")
