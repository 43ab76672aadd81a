"""Speed, and the pure parts of sharing: what is timed, and who scores what."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import user

from guardtrain.errors import ConfigError
from guardtrain.evaluate.files import parse_modes
from guardtrain.evaluate.shared import deal
from guardtrain.evaluate.speed import measure_latency, measure_throughput
from guardtrain.inference.cascade import Cascade
from guardtrain.inference.scorer import Scored
from guardtrain.types import Mode

PROMPTS = [user(str(number)) for number in range(10)]


class Recorder:
    """Notes each call, and sleeps for as many milliseconds as the first prompt says."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[Mode], bool]] = []

    def score(self, prompts: Any, modes: Any, *, escalates: Any = None) -> Any:
        texts = [prompt[0].content for prompt in prompts]
        self.calls.append((texts, list(modes), escalates is not None))
        time.sleep(int(texts[0]) / 100)
        for index in range(len(prompts)):
            yield index, Scored({Mode.OFF: 0.0}, {Mode.OFF: True})


def test_latency_is_of_one_prompt_at_a_time() -> None:
    scorer = Recorder()
    found = measure_latency(scorer, PROMPTS, ["off", "cascade"], rows=3, cascade=Cascade(0.0, 1.0))
    assert found.keys() == {"off", "cascade"}
    one_by_one = [["0"], ["0"], ["1"], ["2"]]  # the first is warmed up
    assert [texts for texts, _, _ in scorer.calls] == 2 * one_by_one
    assert [(modes, escalates) for _, modes, escalates in scorer.calls] == 4 * [([Mode.OFF], False)] + 4 * [(list(Mode), True)]
    for latency in found.values():
        assert 0.01 <= latency.p50_seconds <= latency.p95_seconds
        assert latency.p95_seconds >= 0.019, "between the second and the third"


def test_throughput_is_of_all_at_once() -> None:
    scorer = Recorder()
    rates = measure_throughput(scorer, PROMPTS[5:], ["both"], rows=4)
    assert scorer.calls == [(["5"], list(Mode), False), (["5", "6", "7", "8"], list(Mode), False)]
    assert 0 < rates["both"] <= 4 / 0.05


@pytest.mark.parametrize("measure", [measure_latency, measure_throughput])
def test_what_cannot_be_timed_is_refused(measure: Any) -> None:
    for prompts, rows in (([], 3), (PROMPTS, 0)):
        with pytest.raises(ConfigError, match="nothing to time"):
            measure(Recorder(), prompts, ["off"], rows=rows)
    with pytest.raises(ConfigError, match="needs a calibrated guard"):
        measure(Recorder(), PROMPTS, ["cascade"], rows=1)


@given(costs=st.lists(st.integers(1, 50), max_size=30), hands=st.integers(1, 5))
def test_batches_are_dealt_once_and_evenly(costs: list[int], hands: int) -> None:
    dealt = deal(costs, hands)
    assert len(dealt) == hands
    assert sorted(index for hand in dealt for index in hand) == list(range(len(costs)))
    sums = [sum(costs[index] for index in hand) for hand in dealt]
    assert max(sums) - min(sums) <= max(costs, default=0), "nobody has more than one batch too many"
    best = max(sum(costs) / hands, max(costs, default=0))
    assert max(sums) <= 4 / 3 * best + max(costs, default=0) / 3
    assert dealt == deal(costs, hands)


def test_the_longest_is_dealt_first() -> None:
    assert deal([1, 1, 1, 3], 2) == [[3], [0, 1, 2]]


def test_modes_are_parsed() -> None:
    assert parse_modes("off, cascade") == ["off", "cascade"]
    for text in ("", "off,off", "of"):
        with pytest.raises(ConfigError, match="some of off,on,both,cascade"):
            parse_modes(text)
