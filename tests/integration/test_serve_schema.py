"""Schemathesis asks what the OpenAPI document allows, and what it does not: no answer is a fault of the server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from served import KnownGuard, Served, load_known, serving, settings_for, upstream_server

PATHS = {
    *("/v1/moderations", "/v1/chat/completions", "/v1/models", "/v1/reasons/{judged_id}", "/healthz", "/readyz", "/metrics"),
    "/beta/litellm_basic_guardrail_api",
}


@pytest.fixture(scope="module")
def server(known_guard: KnownGuard) -> Iterator[Served]:
    with upstream_server() as upstream, serving(load_known(known_guard), settings_for(upstream.url)) as served:
        yield served


@pytest.mark.parametrize("generation", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", sorted(PATHS))
def test_no_answer_is_a_fault(server: Served, path: str, generation: schemathesis.GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    (operation,) = (found.ok() for found in schema.include(path=path).get_all_operations())

    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=generation))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    with contextlib.suppress(Unsatisfiable):  # what takes no parameters cannot be asked wrongly
        ask()


def test_every_endpoint_is_in_the_document(server: Served) -> None:
    with server.client() as http:
        assert set(http.get("/openapi.json").json()["paths"]) == PATHS
