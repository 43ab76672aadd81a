"""`guardtrain serve` under load on loopback: latency of a lone client, requests a second of 32, ten thousand requests, memory.

    python benchmarks/serving.py --model RUN --out benchmarks/results/serving.json
    python benchmarks/serving.py --model RUN --out /tmp/rehearsal.json --tiny
    python benchmarks/serving.py --model RUN --out benchmarks/results/serving.json --only ready_seconds

The real server in processes of its own, an asynchronous HTTP client over keep-alive connections, every prompt a text of its
own, so that neither memory nor sharing helps. "Unbatched" is the same server with `--max-batch 1`; they take turns, as machines
are not equally fast all the time. Of the ten thousand, every answer must be there, with a verdict, under an id that no other
has; a sample is asked once more, of a guard that has one text at a time, and must score the same. Each part says when it was
measured, and what share of the processors the host gave to others meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from guardtrain.config import Source
from guardtrain.data.sources import load_sources
from guardtrain.environment import describe_environment
from guardtrain.types import prompt_text

MODES = ("off", "on", "cascade")
PARTS = ("ready_seconds", "lone_client", *(f"under_load_{mode}" for mode in MODES), "many")
READY_SECONDS = 120.0
WORDS = 14  # of a text that is not said to have another length, and a number behind them
OTHER_WORDS = (7, 56)
LEAST_WORDS = 5  # of a row that texts are made of: languages without spaces have one


@dataclass(frozen=True)
class Size:
    """How much is asked.

    rounds: turns of both servers, each of so many requests; the unbatched
    server has the first of the same texts.
    """

    clients: int = 32
    starts: int = 3
    rounds: int = 3
    lone: dict[str, int] = field(default_factory=lambda: {"off": 200, "on": 20, "cascade": 60})
    batched: dict[str, int] = field(default_factory=lambda: {"off": 320, "on": 96, "cascade": 256})
    unbatched: dict[str, int] = field(default_factory=lambda: {"off": 128, "on": 32, "cascade": 256})
    many: int = 10_000
    again: int = 200


TINY = Size(
    clients=8,
    starts=1,
    rounds=1,
    lone=dict.fromkeys(MODES, 4),
    batched=dict.fromkeys(MODES, 24),
    unbatched=dict.fromkeys(MODES, 16),
    many=64,
    again=8,
)


@dataclass(frozen=True)
class Answer:
    """One request. status: of HTTP. ours: what the result says of this guard; None where there was no verdict."""

    text: str
    seconds: float
    status: int
    ours: dict[str, Any] | None


class Server:
    """A running `guardtrain serve` and a client."""

    def __init__(self, process: subprocess.Popen[str], model: str, url: str, ready_seconds: float) -> None:
        self.process, self.model, self.url, self.ready_seconds = process, model, url, ready_seconds

    def resident_mib(self) -> float:
        """Of the server and its model process."""
        return sum(map(_resident_mib, [self.process.pid, *_children(self.process.pid)]))


@contextmanager
def served(model: str, *options: str) -> Iterator[Server]:
    """A server from its start to its end, which must be a clean one."""
    command = [sys.executable, "-m", "guardtrain", "serve", model, "--port", "0", "--timeout", "600", "--queue", "4096", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        _until_ready(url)
        yield Server(process, model, url, time.perf_counter() - start)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    if code:
        raise RuntimeError(f"the server ended with {code}")


def _until_ready(url: str) -> None:
    end = time.perf_counter() + READY_SECONDS
    while time.perf_counter() < end:
        try:
            if httpx2.get(f"{url}/readyz").status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.02)
    raise RuntimeError("the server is not ready")


def stolen() -> tuple[int, int]:
    """Ticks that the host gave to others while this machine wanted them, and all ticks."""
    ticks = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[7], sum(ticks)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread may end meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def _resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def texts(words: int = WORDS) -> Iterator[str]:
    """Texts of so many words without end, no two alike."""
    rows = [prompt_text(example.prompt).split() for example in load_sources([Source(path="starter-hard")], "guard").examples]
    cut = [" ".join(itertools.islice(itertools.cycle(row), words)) for row in rows if len(row) >= LEAST_WORDS]
    for number in itertools.count(1):
        yield f"{cut[number % len(cut)]} ({number})"


async def ask(client: httpx2.AsyncClient, url: str, text: str, mode: str) -> Answer:
    """One request."""
    start = time.perf_counter()
    response = await client.post(f"{url}/v1/moderations", json={"input": text, "mode": mode})
    seconds = time.perf_counter() - start
    is_answered = response.status_code == 200
    return Answer(text, seconds, response.status_code, response.json()["results"][0]["guardtrain"] if is_answered else None)


async def load(
    url: str, prompts: Sequence[str], mode: str, clients: int, on_answer: Callable[[int], None] = lambda count: None
) -> tuple[float, list[Answer]]:
    """All prompts by so many clients, each with one request at a time; seconds, and the answers in any order."""
    left = iter(prompts)
    answers: list[Answer] = []
    async with httpx2.AsyncClient(timeout=600, limits=httpx2.Limits(max_connections=clients)) as client:

        async def one_client() -> None:
            for text in left:
                answers.append(await ask(client, url, text, mode))
                on_answer(len(answers))

        start = time.perf_counter()
        everyone: list[Awaitable[None]] = [one_client() for _ in range(clients)]
        await asyncio.gather(*everyone)
        return time.perf_counter() - start, answers


def milliseconds(answers: Sequence[Answer]) -> dict[str, float]:
    """Percentiles of the wait."""
    values = sorted(1000 * answer.seconds for answer in answers)
    return {f"p{percent}": round(values[min(len(values) - 1, len(values) * percent // 100)], 1) for percent in (50, 95, 99)}


Load = tuple[float, list[Answer]]


def warm(server: Server, prompts: Iterator[str], mode: str, clients: int) -> None:
    """Two requests of each client, which count for nothing."""
    asyncio.run(load(server.url, list(itertools.islice(prompts, 2 * clients)), mode, clients))


def loaded(server: Server, prompts: Iterator[str], mode: str, number: int, clients: int) -> Load:
    """Seconds and answers of so many requests."""
    return asyncio.run(load(server.url, list(itertools.islice(prompts, number)), mode, clients))


def figures(loads: Sequence[Load], mode: str, clients: int) -> dict[str, Any]:
    """Of one or more loads of one server, together."""
    answers = [answer for _, each in loads for answer in each]
    escalated = [bool(answer.ours["escalated"]) for answer in answers if answer.ours]
    return {
        "requests": len(answers),
        "clients": clients,
        "statuses": {str(status): count for status, count in Counter(answer.status for answer in answers).items()},
        "requests_per_second": round(len(answers) / sum(seconds for seconds, _ in loads), 2),
        "requests_per_second_by_round": [round(len(each) / seconds, 2) for seconds, each in loads],
        "latency_ms": milliseconds(answers),
        **({"escalated": round(statistics.mean(escalated), 3)} if mode == "cascade" else {}),
    }


def alone(server: Server, prompts: Iterator[str], mode: str, number: int) -> dict[str, Any]:
    """Figures of one client that waits for each answer."""
    warm(server, prompts, mode, 1)
    return figures([loaded(server, prompts, mode, number, 1)], mode, 1)


def in_turns(batched: Server, unbatched: Server, prompts: Iterator[str], mode: str, size: Size) -> dict[str, Any]:
    """Figures of both under many clients, and how many times the requests a second of one after the other."""
    servers = {"batched": (batched, size.batched[mode]), "unbatched": (unbatched, size.unbatched[mode])}
    loads: dict[str, list[Load]] = {name: [] for name in servers}
    for server, _ in servers.values():
        warm(server, prompts, mode, size.clients)
    for _ in range(size.rounds):
        chosen = list(itertools.islice(prompts, size.batched[mode]))
        for name, (server, number) in servers.items():
            loads[name].append(loaded(server, iter(chosen), mode, number, size.clients))
    found = {name: figures(each, mode, size.clients) for name, each in loads.items()}
    rate = "requests_per_second"
    return {**found, "speedup": round(found["batched"][rate] / found["unbatched"][rate], 2)}


def many(server: Server, prompts: Iterator[str], size: Size) -> dict[str, Any]:
    """Ten thousand requests: what came back, and memory meanwhile."""
    chosen = list(itertools.islice(prompts, size.many))
    resident = [round(server.resident_mib(), 1)]

    def watch(count: int) -> None:
        if count % max(1, size.many // 20) == 0:
            resident.append(round(server.resident_mib(), 1))

    seconds, answers = asyncio.run(load(server.url, chosen, "off", size.clients, watch))
    judged = {answer.text: answer.ours for answer in answers if answer.ours and answer.ours["decision"]}
    again = chosen[:: max(1, len(chosen) // size.again)]
    return {
        "requests": size.many,
        "clients": size.clients,
        "requests_per_second": round(size.many / seconds, 2),
        "latency_ms": milliseconds(answers),
        "answers": len(answers),
        "statuses": {str(status): count for status, count in Counter(answer.status for answer in answers).items()},
        "texts_with_a_verdict": len(judged),
        "distinct_ids": len({ours["id"] for ours in judged.values()}),
        "resident_mib": resident,
        "asked_again": compared({text: judged[text]["score"] for text in again if text in judged}, server.model),
    }


def compared(scores: dict[str, float], model: str) -> dict[str, Any]:
    """The scores that were served beside those of a guard in this process that is asked one text at a time."""
    from guardtrain.serve import Guard

    with Guard.load(model, mode="off") as guard:
        alone = {text: guard.check(text, timeout_seconds=600).score for text in scores}
    differences = [abs(score - (alone[text] or 0.0)) for text, score in scores.items()]
    return {"texts": len(scores), "distinct_scores": len(set(scores.values())), "largest_difference": max(differences)}


def starts(model: str, size: Size) -> list[float]:
    """Seconds from the command to a server that is ready."""
    ready = []
    for _ in range(size.starts):
        with served(model) as server:
            ready.append(round(server.ready_seconds, 2))
    return ready


def lone_client(model: str, prompts: Iterator[str], size: Size) -> dict[str, Any]:
    """Figures of one client in every mode, and what a text's length does to its wait in mode off."""
    with served(model) as server:
        found: dict[str, Any] = {mode: alone(server, prompts, mode, size.lone[mode]) for mode in MODES}
        by_words = {words: alone(server, texts(words), "off", size.lone["off"])["latency_ms"] for words in OTHER_WORDS}
    return found | {"off_by_words": by_words}


def under_load(model: str, prompts: Iterator[str], mode: str, size: Size) -> dict[str, Any]:
    """Figures of many clients, of a server that batches and of one that does not."""
    with served(model) as batched, served(model, "--max-batch", "1") as unbatched:
        return in_turns(batched, unbatched, prompts, mode, size)


def many_requests(model: str, prompts: Iterator[str], size: Size) -> dict[str, Any]:
    """Figures of ten thousand requests."""
    with served(model) as server:
        return many(server, prompts, size)


def main() -> None:
    """Start servers, load them, write what was found as soon as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="A rehearsal: a few requests of each.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="Other parts stay as they are in the file.")
    args = parser.parse_args()
    size, prompts = TINY if args.tiny else Size(), texts()
    measure: dict[str, Callable[[], Any]] = {
        "ready_seconds": lambda: starts(args.model, size),
        "lone_client": lambda: lone_client(args.model, prompts, size),
        **{f"under_load_{mode}": partial(under_load, args.model, prompts, mode, size) for mode in MODES},
        "many": lambda: many_requests(args.model, prompts, size),
    }
    results = json.loads(args.out.read_text()) if args.out.exists() and set(args.only) != set(PARTS) else {}
    results["command"] = shlex.join(
        ["python", "benchmarks/serving.py", "--model", Path(args.model).name, *["--tiny"] * args.tiny]
    )
    for name in args.only:
        before, load_before = stolen(), os.getloadavg()[0]
        found = measure[name]()
        share = round((stolen()[0] - before[0]) / (stolen()[1] - before[1]), 3)
        circumstances = {"environment": describe_environment(), "load_before": load_before, "stolen_share_of_cpu": share}
        results[name] = {"found": found, **circumstances}
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: results[name]}), flush=True)


if __name__ == "__main__":
    main()
