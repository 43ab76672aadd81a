"""The middlewares in real programs: a FastAPI agent, a chain, and the `openai` client; with a guard here and one far away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI, Request
from openai import AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError, OpenAI
from served import KnownGuard, Upstream, load_known, serving, upstream_server, wait_until

from guardtrain.errors import ServeError
from guardtrain.serve.guard import Guard
from guardtrain.serve.middleware import GuardBlocked
from guardtrain.serve.middleware.asgi import GuardMiddleware, untrusted_texts
from guardtrain.serve.middleware.langchain import GuardStep
from guardtrain.serve.middleware.openai import guarded_async_client, guarded_client
from guardtrain.serve.remote import RemoteGuard
from guardtrain.serve.server import listen
from guardtrain.serve.settings import ServeSettings
from guardtrain.serve.verdict import Failure

KEY = "key"
WHERE = ["here", "far"]


@pytest.fixture(scope="module")
def guards(known_guard: KnownGuard) -> Iterator[dict[str, Any]]:
    """The same guard in this process, and behind a URL."""
    with load_known(known_guard) as here, serving(load_known(known_guard), ServeSettings(api_key=KEY)) as served:
        yield {"here": {"guard": here}, "far": {"guard": served.url, "api_key": KEY}}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with upstream_server() as running:
        yield running


def _human(content: Any) -> Any:
    """As LangChain's messages look from outside."""
    return SimpleNamespace(type="human", content=content)


@contextmanager
def agent(**options: Any) -> Iterator[tuple[str, list[bytes]]]:
    """An agent that notes what it was told."""
    told: list[bytes] = []
    app = FastAPI()
    app.add_middleware(GuardMiddleware, paths=["/chat"], **options)

    @app.post("/chat")
    @app.post("/open")
    async def chat(request: Request) -> str:
        told.append(await request.body())
        return "done"

    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", told
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize("where", WHERE)
def test_an_agent_hears_nothing_of_an_attack(guards: dict[str, Any], known_guard: KnownGuard, where: str) -> None:
    attack, harmless = known_guard.attack, known_guard.harmless
    with agent(**guards[where]) as (url, told), httpx2.Client(base_url=url, timeout=30) as http:
        assert http.post("/chat", json={"messages": [{"role": "user", "content": harmless}], "model": "m"}).json() == "done"
        blocked = http.post("/chat", json={"messages": [{"role": "user", "content": attack}]})
        assert (blocked.status_code, blocked.json()["error"]["code"]) == (400, "content_blocked")
        assert http.post("/chat", json={"question": {"text": attack}}).status_code == 400
        assert http.post("/chat", content=attack, headers={"Content-Type": "text/plain"}).status_code == 400
        assert http.post("/chat", data={"q": attack}).status_code == 400
        assert http.post("/chat", params={"q": attack}).status_code == 400
        assert http.post("/chat", files={"file": b"\x00\xff"}).json()["error"]["code"] == "unreadable_content"
        assert len(told) == 1
        assert http.post("/open", content=attack).status_code == 200


def test_an_agent_whose_guard_is_gone(known_guard: KnownGuard) -> None:
    for fails_open, status in (((), 503), ((Failure.MODEL,), 200)):
        with agent(guard="http://127.0.0.1:9", fails_open=fails_open) as (url, told):
            assert httpx2.post(f"{url}/chat", json={"q": known_guard.harmless}, timeout=30).status_code == status
            assert len(told) == (1 if status == 200 else 0)


def test_a_key_that_is_refused_never_opens(guards: dict[str, Any], known_guard: KnownGuard) -> None:
    wrong = {**guards["far"], "api_key": "wrong", "fails_open": tuple(Failure)}
    with agent(**wrong) as (url, told):
        assert httpx2.post(f"{url}/chat", json={"q": known_guard.harmless}, timeout=30).status_code == 503
        assert told == []
    with pytest.raises(ServeError, match="refused, found status 401"):
        GuardStep(**wrong).invoke(known_guard.harmless)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda text: text,
        lambda text: {"input": text, "history": []},
        lambda text: [("system", "Be brief."), ("human", text)],
        lambda text: [{"role": "user", "content": text}],
        lambda text: [SimpleNamespace(type="ai", content="Well."), _human(text)],
        lambda text: SimpleNamespace(
            to_messages=lambda: [SimpleNamespace(type="human", content=[{"type": "text", "text": text}])]
        ),
    ],
    ids=["text", "mapping", "pairs", "openai", "messages", "prompt-value"],
)
def test_a_step_of_a_chain(guards: dict[str, Any], known_guard: KnownGuard, wrapped: Callable[[str], Any], where: str) -> None:
    step, given = GuardStep(**guards[where]), wrapped(known_guard.harmless)
    assert step.invoke(given) is given
    assert step(given) is given
    assert asyncio.run(step.ainvoke(given)) is given
    with pytest.raises(GuardBlocked, match="malicious"):
        step.invoke(wrapped(known_guard.attack))
    polite = GuardStep(**guards[where], on_block=lambda blocked: blocked.verdict.decision)
    assert polite.invoke(wrapped(known_guard.attack)) == "malicious"


def test_a_step_is_as_wide_as_what_flows_through_it(guards: dict[str, Any], known_guard: KnownGuard) -> None:
    step = GuardStep(**guards["here"])
    with pytest.raises(GuardBlocked, match="no verdict"):
        step.invoke([_human([{"type": "image_url", "image_url": "data:,"}])])
    assert step.invoke([SimpleNamespace(type="ai", content=known_guard.attack)])  # its own words


@pytest.mark.parametrize("where", WHERE)
def test_no_method_of_the_openai_client_goes_round_the_guard(
    guards: dict[str, Any], known_guard: KnownGuard, upstream: Upstream, where: str
) -> None:
    upstream.seen.clear()
    client = OpenAI(base_url=f"{upstream.url}/v1", api_key="k", http_client=guarded_client(**guards[where]), max_retries=0)
    chat: Any = client.chat.completions
    attack, harmless = ([{"role": "user", "content": text}] for text in (known_guard.attack, known_guard.harmless))
    assert chat.create(model="echo", messages=harmless).choices[0].message.content == "One two three"
    assert len(list(chat.create(model="echo", messages=harmless, stream=True))) == 4
    for method in (
        lambda: chat.create(model="echo", messages=attack),
        lambda: chat.create(model="echo", messages=attack, stream=True),
        lambda: chat.with_raw_response.create(model="echo", messages=attack),
        lambda: chat.parse(model="echo", messages=attack),
        lambda: client.responses.create(model="echo", input=known_guard.attack),
        lambda: client.responses.create(prompt={"id": "pmpt_1", "variables": {"question": known_guard.attack}}),
        lambda: client.conversations.create(items=[{"role": "user", "content": known_guard.attack}]),
        lambda: client.conversations.items.create("conv_1", items=[{"role": "user", "content": known_guard.attack}]),
        lambda: client.completions.create(model="echo", prompt=known_guard.attack),
        lambda: client.post("/of/next/year", cast_to=object, body={"said": [known_guard.attack]}),
    ):
        with pytest.raises(BadRequestError) as caught:
            method()
        assert caught.value.code == "content_blocked"
    assert len(upstream.seen) == 2
    assert [model.id for model in client.models.list()] == ["echo"]
    with pytest.raises(NotFoundError):  # a request without a body goes on, to an upstream that has no such thing
        client.responses.cancel("resp_1")


def test_the_async_openai_client_and_a_guard_that_is_gone(known_guard: KnownGuard, upstream: Upstream, guards: Any) -> None:
    async def ask(http_client: httpx2.AsyncClient, text: str) -> Any:
        async with AsyncOpenAI(base_url=f"{upstream.url}/v1", api_key="k", http_client=http_client, max_retries=0) as client:
            return await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}])

    assert asyncio.run(ask(guarded_async_client(**guards["here"]), known_guard.harmless)).choices
    with pytest.raises(BadRequestError):
        asyncio.run(ask(guarded_async_client(**guards["here"]), known_guard.attack))
    with pytest.raises(InternalServerError) as caught:
        asyncio.run(ask(guarded_async_client("http://127.0.0.1:9"), known_guard.harmless))
    assert caught.value.code == "guard_unavailable"


def test_a_guard_far_away_says_what_one_here_says(guards: dict[str, Any], known_guard: KnownGuard) -> None:
    here: Guard = guards["here"]["guard"]
    with RemoteGuard(guards["far"]["guard"] + "/v1", api_key=KEY) as far:
        for prompt in (known_guard.attack, known_guard.harmless, [{"role": "tool", "content": known_guard.attack}]):
            one, other = here.check(prompt), far.check(prompt)
            assert (one.decision, one.status, one.threshold_version) == (other.decision, other.status, other.threshold_version)
            assert one.score == pytest.approx(other.score)
        assert [verdict.failure for verdict in far.check_many(["half \ud800", "word " * 100_000])] == [
            Failure.UNREADABLE,
            Failure.TOO_LONG,
        ]


def test_beside_messages_single_names_are_no_texts() -> None:
    body = {"messages": [{"role": "user", "content": "a b"}], "model": "gpt-x", "extra": "c d", "n": 1}
    assert [piece.text for piece in untrusted_texts(body)] == ["a b", "c d"]
    assert [piece.text for piece in untrusted_texts(["a", {"b": "c"}])] == ["a\nc"]
