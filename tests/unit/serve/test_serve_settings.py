"""What a server is told at its start is right, or refused in one line."""

from __future__ import annotations

import pytest

from guardtrain.errors import ConfigError
from guardtrain.serve.settings import parse_failures, parse_roles, parse_url
from guardtrain.serve.verdict import Failure


def test_failures_by_name() -> None:
    assert parse_failures("--fail-open", "timeout, model") == {Failure.TIMEOUT, Failure.MODEL}
    assert parse_failures("--fail-open", None) == frozenset()


@pytest.mark.parametrize("text", ["auth", "all", "model;timeout", "Model"])
def test_nothing_else_can_fail_open(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--fail-open: unknown failure, expected model, timeout"):
        parse_failures("--fail-open", text)


@pytest.mark.parametrize("text", ["", "users", "user,,nobody"])
def test_roles_that_nobody_has(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown role"):
        parse_roles("--check-roles", text)


def test_an_address_loses_its_slash() -> None:
    assert parse_url("--upstream", "https://models.example:8443/v1/") == "https://models.example:8443/v1"


@pytest.mark.parametrize(
    "text", ["localhost:8000", "ftp://x/v1", "http://", "http://x:port/v1", "http://x/v1?a=b", "http://x:0/"]
)
def test_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        parse_url("--upstream", text)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url("--upstream", "http://user:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)
