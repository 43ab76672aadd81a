"""The command `guardtrain serve`."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardtrain.errors import ConfigError
from guardtrain.options import AsJson, one_of, read_text
from guardtrain.terminal import start

if TYPE_CHECKING:
    from guardtrain.serve.guard import Guard
    from guardtrain.serve.settings import ServeSettings, UpstreamSettings

logger = logging.getLogger(__name__)

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "httpx2")


def serve(
    model: Annotated[str, typer.Argument(help="A run or model folder, an embedded name, or a Hugging Face id.")],
    upstream: Annotated[str | None, typer.Option(metavar="URL", help="The model server behind /v1/chat/completions.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free, see --json.")] = 8000,
    mode: Annotated[str | None, typer.Option(help="off, on, both or cascade. Default: the guard's own.")] = None,
    api_key_env: Annotated[str | None, typer.Option(metavar="NAME", help="The variable with the key that clients show.")] = None,
    upstream_key_env: Annotated[str | None, typer.Option(metavar="NAME", help="The variable with the upstream's key.")] = None,
    forward_authorization: Annotated[
        bool, typer.Option("--forward-authorization", help="Clients' own Authorization goes on to the upstream.")
    ] = False,
    fail_open: Annotated[
        str | None, typer.Option(metavar="CLASS,CLASS", help="model, timeout, overloaded, too_long, unreadable: let these pass.")
    ] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Let everything pass, and log what would have been blocked.")] = False,
    block_status: Annotated[int, typer.Option(help="Of a blocked completion: 200 (content_filter) or 400 (an error).")] = 200,
    check_roles: Annotated[str, typer.Option(metavar="ROLE,ROLE", help="Whose turns the proxy checks.")] = "user,tool",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="The log holds prompts and reasons.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to read a request, and to judge it.")] = 10.0,
    upstream_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without a byte from the upstream.")] = 60.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that requests in flight have after SIGTERM.")] = 30.0,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Of a request.")] = 4 * 2**20,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a text; longer ones are refused.")] = 32_768,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts that the model reads at once.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Texts that may wait; from then on 429.")] = 256,
    backend: Annotated[str, typer.Option(help="process: here; openai, openai-chat: at --backend-url.")] = "process",
    backend_url: Annotated[str | None, typer.Option(metavar="URL", help="A server that gives log-probabilities.")] = None,
    backend_key_env: Annotated[str | None, typer.Option(metavar="NAME", help="The variable with that server's key.")] = None,
    policy: Annotated[Path | None, typer.Option(help="A text file with another policy than the guard's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put a guard behind HTTP: moderations, LiteLLM's guardrail, a chat proxy, metrics, and a page to try it. Fails closed."""
    one_of("--block-status", str(block_status), ("200", "400"))
    if upstream is None and (upstream_key_env is not None or forward_authorization):
        raise ConfigError("goes with --upstream", where="--upstream-key-env, --forward-authorization", expected="--upstream URL")
    start()
    _need_packages()
    from guardtrain.serve.options import GuardOptions
    from guardtrain.serve.settings import ServeSettings, parse_failures

    behind = None if upstream is None else _upstream(upstream, upstream_timeout, check_roles, block_status)
    if behind is not None:
        key = _key("--upstream-key-env", upstream_key_env)
        behind = replace(behind, key=key, forwards_authorization=forward_authorization)
    settings = ServeSettings(
        mode=mode,
        api_key=_key("--api-key-env", api_key_env),
        fails_open=parse_failures("--fail-open", fail_open),
        is_shadow=shadow,
        logs_prompts=log_prompts,
        timeout_seconds=timeout,
        drain_seconds=drain,
        max_body_bytes=max_body_bytes,
        upstream=behind,
    )
    guard: dict[str, Any] = {"mode": mode, "backend": backend, "base_url": backend_url, "policy": read_text("--policy", policy)}
    guard["api_key"] = _key("--backend-key-env", backend_key_env)
    guard["options"] = GuardOptions(timeout_seconds=timeout, queue=queue, max_batch=max_batch, max_tokens=max_tokens)
    raise typer.Exit(_run(model, guard, settings, (host, port), as_json=as_json))


def _need_packages() -> None:
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ConfigError("a package is missing", expected=name, hint='pip install "guardtrain[serve]"')


def _run(model: str, arguments: dict[str, Any], settings: ServeSettings, where: tuple[str, int], *, as_json: bool) -> int:
    """Listen, load, serve; the exit code. arguments: of Guard.load."""
    from guardtrain.serve.guard import Guard
    from guardtrain.serve.logs import log_as_json
    from guardtrain.serve.server import listen, run

    listener = listen(*where)
    guard = Guard.load(model, **arguments)
    log_as_json()
    guard.begin()  # the model's process imports what it needs while this one imports the rest: two seconds of ten
    from guardtrain.serve.app import create_app

    host = f"[{where[0]}]" if ":" in where[0] else where[0]
    _announce(f"http://{host}:{listener.getsockname()[1]}", guard, settings, as_json=as_json)
    return run(create_app(guard, settings), listener, drain_seconds=settings.drain_seconds)


def _upstream(url: str, timeout_seconds: float, roles: str, block_status: int) -> UpstreamSettings:
    from guardtrain.serve.settings import UpstreamSettings, parse_roles, parse_url

    return UpstreamSettings(
        url=parse_url("--upstream", url),
        timeout_seconds=timeout_seconds,
        roles=parse_roles("--check-roles", roles),
        block_status=200 if block_status == 200 else 400,
    )


def _key(option: str, variable: str | None) -> str | None:
    """What an environment variable holds. Raises ConfigError where it is named and holds nothing: that would open the door."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError("no key", where=f"{option} {variable}", expected="a variable that holds one", found="nothing in it")
    return key


def _announce(url: str, guard: Guard, settings: ServeSettings, *, as_json: bool) -> None:
    """Where the server is, and what of its settings lets texts pass unchecked."""
    facts = {"url": url, "model": guard.name, "pid": os.getpid()}
    said = f"{url}  guard {guard.name}; ready when {url}/readyz says so"
    print(json.dumps(facts) if as_json else said, flush=True)  # one line, for who reads along
    if settings.api_key is None and not url.startswith(("http://127.0.0.1:", "http://[::1]:", "http://localhost:")):
        logger.warning("everyone who reaches this address may ask: no --api-key-env", extra={"fields": {"url": url}})
    if settings.fails_open or settings.is_shadow:
        fields = {"fail_open": sorted(settings.fails_open), "shadow": settings.is_shadow}
        logger.warning("texts may pass without a verdict", extra={"fields": fields})
