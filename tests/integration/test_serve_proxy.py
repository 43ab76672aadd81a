"""The chat proxy between the `openai` client and a real model server: what passes, what is blocked, an upstream that fails."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from openai import APIError, BadRequestError, InternalServerError, OpenAI
from served import KnownGuard, Served, Upstream, load_known, serving, settings_for, upstream_server, wait_until

from guardtrain.serve.verdict import Failure

KEY, UPSTREAM_KEY = "the-guard's-own-key", "the-upstream's-key"
TEXT = "One two three"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with upstream_server() as running:
        yield running


@pytest.fixture(scope="module")
def server(known_guard: KnownGuard, upstream: Upstream) -> Iterator[Served]:
    settings = settings_for(upstream.url, key=UPSTREAM_KEY, timeout_seconds=1.0, api_key=KEY)
    with serving(load_known(known_guard), settings) as served:
        yield served


@pytest.fixture
def client(server: Served) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def tool_result(text: str, harmless: str) -> list[Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "read_mail", "arguments": "{}"}}
    return [
        *user(harmless),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": text},
    ]


def test_what_is_harmless_is_answered_by_the_upstream(client: OpenAI, upstream: Upstream, known_guard: KnownGuard) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="echo", messages=user(known_guard.harmless), seed=7, extra_body={"top_k": 3}
    )
    answer = raw.parse()
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert raw.headers["X-Guardtrain-Decision"] == "passed"
    assert raw.headers["X-Request-Id"] == "up-1"
    assert upstream.seen[-1] == {"model": "echo", "messages": user(known_guard.harmless), "seed": 7, "top_k": 3}
    assert upstream.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"


def test_a_stream_comes_chunk_by_chunk(server: Served, client: OpenAI, known_guard: KnownGuard) -> None:
    stream = client.chat.completions.create(model="echo", messages=user(known_guard.harmless), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT
    body = {"model": "stall", "messages": user(known_guard.harmless), "stream": True}
    with server.client(headers={"X-API-Key": KEY}) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert "One" in next(answer.iter_text())  # while the upstream has stalled behind it


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_an_attack_ends_in_content_filter(client: OpenAI, upstream: Upstream, known_guard: KnownGuard, stream: bool) -> None:
    before = len(upstream.seen)
    answer: Any = client.chat.completions.create(model="echo", messages=user(known_guard.attack), stream=stream)
    if stream:
        chunks = list(answer)
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "content_filter"]
    else:
        assert answer.choices[0].finish_reason == "content_filter"
        assert answer.to_dict()["guardtrain"]["decision"] == "malicious"
        assert "score" not in answer.to_dict()["guardtrain"]
    assert len(upstream.seen) == before


def test_a_tool_result_is_checked(client: OpenAI, upstream: Upstream, server: Served, known_guard: KnownGuard) -> None:
    """The tiny guard knows its two texts as a user's only: what a tool says is compared with the guard itself."""
    before = len(upstream.seen)
    texts = [known_guard.attack, known_guard.harmless]
    expected = [server.guard.check([{"role": "tool", "content": text}]).blocks() for text in texts]
    for text, is_blocked in zip(texts, expected, strict=True):
        answer = client.chat.completions.create(model="echo", messages=tool_result(text, known_guard.harmless))
        assert (answer.choices[0].finish_reason == "content_filter") is is_blocked
    assert len(upstream.seen) - before == expected.count(False)


def test_an_attack_anywhere_in_the_history_is_found(client: OpenAI, known_guard: KnownGuard) -> None:
    messages = [*user(known_guard.attack), {"role": "assistant", "content": "Well."}, *user(known_guard.harmless)]
    assert client.chat.completions.create(model="echo", messages=messages).choices[0].finish_reason == "content_filter"


def test_a_long_history_of_harmless_turns_passes(client: OpenAI, known_guard: KnownGuard) -> None:
    messages = [turn for _ in range(40) for turn in (*user(known_guard.harmless), {"role": "assistant", "content": "Yes."})]
    assert client.chat.completions.create(model="echo", messages=[*messages, *user(known_guard.harmless)]).choices


def test_the_last_of_two_keys_is_checked_and_sent(server: Served, upstream: Upstream, known_guard: KnownGuard) -> None:
    """Two readers of one body must not find two things in it."""
    before = len(upstream.seen)
    texts = (known_guard.harmless, known_guard.attack)
    harmless, attack = (f'"messages": [{{"role": "user", "content": "{text}"}}]' for text in texts)
    with server.client(headers={"X-API-Key": KEY, "Content-Type": "application/json"}) as http:
        first = http.post("/v1/chat/completions", content=f'{{"model": "echo", {harmless}, {attack}}}')
        assert first.headers["X-Guardtrain-Decision"] == "blocked"
        second = http.post("/v1/chat/completions", content=f'{{"model": "echo", {attack}, {harmless}}}')
    assert second.headers["X-Guardtrain-Decision"] == "passed"
    assert [body["messages"] for body in upstream.seen[before:]] == [user(known_guard.harmless)]


@pytest.mark.parametrize(
    "body",
    [{}, {"messages": []}, {"messages": "text"}, {"messages": ["text"]}, {"messages": [{"role": "user"}], "stream": "yes"}],
    ids=["nothing", "no-turn", "text", "no-object", "stream"],
)
def test_a_request_of_another_form_is_refused(server: Served, upstream: Upstream, body: dict[str, Any]) -> None:
    before = len(upstream.seen)
    with server.client(headers={"X-API-Key": KEY}) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert len(upstream.seen) == before


def test_models_are_the_upstreams(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]


def test_an_upstream_that_is_slow(client: OpenAI, known_guard: KnownGuard) -> None:
    with pytest.raises(InternalServerError) as caught:
        client.chat.completions.create(model="slow", messages=user(known_guard.harmless))
    assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")


def test_an_upstream_that_cuts_its_answer(client: OpenAI, known_guard: KnownGuard, server: Served) -> None:
    with pytest.raises(InternalServerError) as caught:
        client.chat.completions.create(model="cut", messages=user(known_guard.harmless))
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_cut")
    assert server.metrics['guardtrain_upstream_failures_total{"code": "upstream_cut"}'] >= 1


def test_an_upstreams_own_error_goes_through(client: OpenAI, known_guard: KnownGuard) -> None:
    with pytest.raises(InternalServerError, match="out of memory") as caught:
        client.chat.completions.create(model="broken", messages=user(known_guard.harmless))
    assert caught.value.status_code == 500


@pytest.mark.parametrize(("model", "code"), [("cut", "upstream_cut"), ("stall", "upstream_timeout")])
def test_a_stream_that_breaks_off_ends_in_an_error(client: OpenAI, known_guard: KnownGuard, model: str, code: str) -> None:
    stream = client.chat.completions.create(model=model, messages=user(known_guard.harmless), stream=True)
    assert next(stream).choices[0].delta.content == "One"
    with pytest.raises(APIError) as caught:
        list(stream)
    assert caught.value.code == code


def test_a_client_that_leaves_a_stream_ends_it(server: Served, upstream: Upstream, known_guard: KnownGuard) -> None:
    closed, gone = upstream.closed, server.metrics["guardtrain_clients_gone_total{}"]
    body = {"model": "stall", "messages": user(known_guard.harmless), "stream": True}
    with server.client(headers={"X-API-Key": KEY}) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_raw())
    wait_until(lambda: upstream.closed > closed)
    wait_until(lambda: server.metrics["guardtrain_clients_gone_total{}"] > gone)


def test_credentials_stay_here(known_guard: KnownGuard, upstream: Upstream) -> None:
    """The client's key is for the guard; the header goes on only where it is another, and where that is asked for."""
    sent = {"Cookie": "a=b", "X-API-Key": KEY, "Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-Title": "kept"}
    for forwards, expected in ((False, None), (True, "Bearer the-client's-own")):
        settings = settings_for(upstream.url, forwards_authorization=forwards, api_key=KEY)
        with serving(load_known(known_guard), settings) as server, server.client() as http:
            body = {"model": "echo", "messages": user(known_guard.harmless)}
            http.post("/v1/chat/completions", json=body, headers={**sent, "Authorization": "Bearer the-client's-own"})
            assert upstream.headers.get("authorization") == expected
            assert upstream.headers["x-title"] == "kept"
            assert not {"cookie", "x-api-key", "x-hop"} & upstream.headers.keys()
            http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
            assert "authorization" not in upstream.headers


def test_a_dead_upstream_and_a_block_with_status_400(known_guard: KnownGuard) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with serving(load_known(known_guard), settings_for(url, block_status=400)) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(InternalServerError) as dead:
            client.chat.completions.create(model="echo", messages=user(known_guard.harmless))
        assert (dead.value.status_code, dead.value.code) == (502, "upstream_unreachable")
        with pytest.raises(BadRequestError) as blocked:
            client.chat.completions.create(model="echo", messages=user(known_guard.attack))
        assert blocked.value.code == "content_blocked"
        with pytest.raises(InternalServerError) as models:
            client.models.list()
        assert models.value.status_code == 502


def test_a_shadow_forwards_and_tells(known_guard: KnownGuard, upstream: Upstream) -> None:
    with serving(load_known(known_guard), settings_for(upstream.url, is_shadow=True)) as server, server.client() as http:
        answer = http.post("/v1/chat/completions", json={"model": "echo", "messages": user(known_guard.attack)})
    assert answer.json()["choices"][0]["message"]["content"] == TEXT
    assert answer.headers["X-Guardtrain-Shadow"] == "would-block"


def test_content_that_is_no_text_is_refused_unless_it_may_pass(known_guard: KnownGuard, upstream: Upstream) -> None:
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    for fails_open, status in ((frozenset[Failure](), 400), (frozenset({Failure.UNREADABLE}), 200)):
        settings = settings_for(upstream.url, fails_open=fails_open)
        with serving(load_known(known_guard), settings) as server:
            answer = httpx2.post(f"{server.url}/v1/chat/completions", json={"model": "echo", "messages": image}, timeout=30)
            assert answer.status_code == status
            count = server.metrics.get('guardtrain_failed_open_total{"failure": "unreadable"}', 0)
            assert count == (1 if status == 200 else 0)
            if status == 200:
                assert answer.headers["X-Guardtrain-Decision"] == "failed-open"
