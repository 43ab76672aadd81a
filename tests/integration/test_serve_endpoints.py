"""Moderations, LiteLLM's guardrail, reasons, probes and figures over real HTTP, with a tiny guard that knows two texts."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, BadRequestError, OpenAI, RateLimitError
from served import KnownGuard, Served, load_known, serving, wait_until

from guardtrain.serve.settings import ServeSettings

KEY = "the-guard's-own-key"
PAYLOADS = Path(__file__).with_name("payloads")
LITELLM = "/beta/litellm_basic_guardrail_api"


@pytest.fixture(scope="module")
def server(known_guard: KnownGuard) -> Iterator[Served]:
    with serving(load_known(known_guard), ServeSettings(api_key=KEY)) as served:
        yield served


@pytest.fixture
def client(server: Served) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def post(server: Served, path: str, key: str = KEY, **options: Any) -> Any:
    with server.client(headers={"X-API-Key": key}) as http:
        return http.post(path, **options)


def test_the_openai_client_reads_moderations(client: OpenAI, known_guard: KnownGuard, server: Served) -> None:
    attack = client.moderations.create(input=known_guard.attack).results[0]
    harmless = client.moderations.create(input=known_guard.harmless, model="omni-moderation-latest").results[0]
    assert (attack.flagged, harmless.flagged) == (True, False)
    assert attack.categories.harassment is False  # the client's types demand it
    assert attack.category_scores.to_dict()["malicious"] > 0.5 or attack.flagged
    ours = attack.to_dict()["guardtrain"]
    expected = server.guard.check(known_guard.attack)
    assert (ours["decision"], ours["threshold_version"]) == ("malicious", expected.threshold_version)
    assert ours["score"] == pytest.approx(expected.score)
    assert ours["p_malicious"] == pytest.approx(expected.p_malicious)


def test_a_list_is_judged_one_by_one_in_its_order(client: OpenAI, known_guard: KnownGuard) -> None:
    texts = [known_guard.harmless, known_guard.attack, known_guard.harmless]
    assert [result.flagged for result in client.moderations.create(input=texts).results] == [False, True, False]


def test_parts_are_one_text(client: OpenAI, known_guard: KnownGuard) -> None:
    answer = client.moderations.create(input=[{"type": "text", "text": known_guard.attack}])
    assert [result.flagged for result in answer.results] == [True]


def test_an_image_is_no_text(client: OpenAI, known_guard: KnownGuard) -> None:
    image: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(BadRequestError) as caught:
        client.moderations.create(input=[{"type": "text", "text": known_guard.harmless}, image])
    assert caught.value.code == "unreadable_content"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"input": "\xff\xfe"}', "invalid_request"),
        (b'{"input": "half of a pair \\ud800"}', "unreadable_content"),
        (b"[" * 100_000, "invalid_request"),
        (b'{"input": ' + b"9" * 10_000 + b"}", "invalid_request"),
        (b'{"input": []}', "invalid_request"),
        (b'{"input": [1, 2]}', "invalid_request"),
        (b'{"input": "a", "mode": "loud"}', "unknown_mode"),
        (b"", "invalid_request"),
    ],
    ids=["no-utf8", "surrogate", "deep", "huge-number", "empty", "numbers", "mode", "nothing"],
)
def test_a_broken_request_is_said_to_be_broken(server: Served, body: bytes, code: str) -> None:
    answer = post(server, "/v1/moderations", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_nobody_is_heard_without_the_key(server: Served, known_guard: KnownGuard) -> None:
    before = server.metrics["guardtrain_refused_keys_total{}"]
    for key in ("", "the-guard's-own-ke", KEY + "y"):
        answer = post(server, "/v1/moderations", key, json={"input": known_guard.attack})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).moderations.create(input="a")
    assert server.metrics["guardtrain_refused_keys_total{}"] == before + 4
    for path in ("/metrics", "/openapi.json", "/v1/models", "/nowhere"):
        with server.client() as http:
            assert http.get(path).status_code == 401
    for path in ("/healthz", "/readyz", "/"):
        with server.client() as http:
            assert http.get(path).status_code == 200


def test_another_path_is_not_found(server: Served) -> None:
    with server.client(headers={"Authorization": f"bearer {KEY}"}) as http:
        assert http.get("/v1/embeddings").status_code == 404
        assert http.get("/v1/models").json()["error"]["code"] == "no_upstream"


@pytest.mark.parametrize("path", sorted(PAYLOADS.glob("litellm-*.json")), ids=lambda path: path.stem)
def test_litellms_payloads(server: Served, known_guard: KnownGuard, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word, action in (("attack", "BLOCKED"), ("harmless", "NONE")):
        payload = json.loads(text.replace("UNTRUSTED", getattr(known_guard, word)).replace("TRUSTED", known_guard.attack))
        answer = post(server, LITELLM, json=payload)
        assert answer.status_code == 200
        assert answer.json()["action"] == action, answer.text
        assert ("blocked_reason" in answer.json()) is (action == "BLOCKED")


def test_litellm_sends_an_image(server: Served, known_guard: KnownGuard) -> None:
    """An error would let it pass where LiteLLM is told to fail open: the answer is a block."""
    answer = post(server, LITELLM, json={"texts": [known_guard.harmless], "images": ["AAAA"], "input_type": "request"})
    assert (answer.status_code, answer.json()["action"]) == (200, "BLOCKED")
    assert "unreadable" in answer.json()["blocked_reason"]


def test_a_reason_follows_when_it_is_asked_for(server: Served, known_guard: KnownGuard) -> None:
    blocked = post(server, "/v1/moderations", json={"input": known_guard.attack}).json()["results"][0]["guardtrain"]
    passed = post(server, "/v1/moderations", json={"input": known_guard.harmless}).json()["results"][0]["guardtrain"]
    assert blocked["reason"] is None
    assert passed["reason_later"] is None
    with server.client(headers={"X-API-Key": KEY}) as http:
        assert http.get(blocked["reason_later"]).status_code == 202
        wait_until(lambda: http.get(blocked["reason_later"]).status_code == 200)
        told = http.get(blocked["reason_later"]).json()
        assert (told["mode"], told["reason"]) == ("on", server.guard.check(known_guard.attack, mode="on").reason)
        assert http.get(f"/v1/reasons/{'0' * 32}").status_code == 404


def test_the_log_knows_a_text_by_its_hash(server: Served, known_guard: KnownGuard, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("guardtrain")
    logger.propagate = True
    caplog.set_level(logging.INFO, "guardtrain")
    post(server, "/v1/moderations", json={"input": known_guard.attack})
    wait_until(lambda: any(record.message == "request" for record in caplog.records))
    fields = next(record.fields for record in caplog.records if record.message == "request")  # type: ignore[attr-defined]
    (check,) = fields["checks"]
    assert (check["decision"], check["blocked"], check["characters"]) == ("malicious", True, len(known_guard.attack))
    assert known_guard.attack not in json.dumps(fields)


def test_figures_hold_no_text(server: Served, known_guard: KnownGuard) -> None:
    post(server, "/v1/moderations", json={"input": known_guard.attack})
    with server.client(headers={"X-API-Key": KEY}) as http:
        shown = http.get("/metrics").text
        http.get(f"/{known_guard.attack}")
        assert known_guard.attack.split()[0] not in http.get("/metrics").text
    for name in ("verdicts_total", "check_seconds_bucket", "queue_depth", "cache_hits_total", "model_restarts_total", "ready"):
        assert f"guardtrain_{name}" in shown
    assert 'guardtrain_verdicts_total{decision="malicious",status="ok"}' in shown


def test_a_text_that_is_too_long_and_a_body_that_is(known_guard: KnownGuard) -> None:
    guard = load_known(known_guard, max_tokens=64)
    with serving(guard, ServeSettings(max_body_bytes=100_000)) as server:
        long = post(server, "/v1/moderations", json={"input": "word " * 100})
        assert (long.status_code, long.json()["error"]["code"]) == (413, "prompt_too_long")
        body = post(server, "/v1/moderations", json={"input": "a" * 100_000})
        assert (body.status_code, body.json()["error"]["code"]) == (413, "body_too_large")
        many = post(server, "/v1/moderations", json={"input": ["a"] * 3000})
        assert (many.status_code, many.json()["error"]["code"]) == (413, "too_many_texts")


def test_a_queue_that_is_full_says_when_to_come_back(known_guard: KnownGuard) -> None:
    """One place, and many who want it at the same time."""
    with serving(load_known(known_guard, queue=1, cache=0)) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        refused: list[RateLimitError] = []

        def ask(number: int) -> None:
            try:
                client.moderations.create(input=f"{known_guard.attack} {number}", extra_body={"mode": "on"})
            except RateLimitError as error:
                refused.append(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refused
        assert refused[0].code == "guard_overloaded"
        assert int(refused[0].response.headers["Retry-After"]) >= 1
        assert server.metrics['guardtrain_failures_total{"failure": "overloaded"}'] == len(refused)


def test_a_shadow_lets_pass_and_tells(known_guard: KnownGuard) -> None:
    with serving(load_known(known_guard), ServeSettings(is_shadow=True)) as server:
        answer = post(server, "/v1/moderations", json={"input": known_guard.attack})
        assert answer.headers["X-Guardtrain-Shadow"] == "would-block"
        (result,) = answer.json()["results"]
        assert (result["flagged"], result["guardtrain"]["decision"]) == (False, "malicious")
        assert post(server, LITELLM, json={"texts": [known_guard.attack]}).json()["action"] == "NONE"
        assert server.metrics["guardtrain_shadow_passed_total{}"] == 2
