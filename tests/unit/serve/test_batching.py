"""What the model does next: what waits is read together, within bounds, and nothing starves."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_guards import MAX_REASON_TOKENS, load_tiny
from tiny_models import user

from guardtrain.inference import live as live_module
from guardtrain.inference.live import LiveScorer
from guardtrain.inference.scored import Question
from guardtrain.serve.engine import Ask, Drop, Engine
from guardtrain.types import Mode

OFF, ON = Question(frozenset({Mode.OFF})), Question(frozenset({Mode.ON}))
SHORT, LONG = "Water them.", "Water the plants, all of them. " * 30


@pytest.fixture(scope="module")
def live(smol_tokenizer: Any) -> LiveScorer:
    loaded = load_tiny(smol_tokenizer)
    return LiveScorer(loaded.model, smol_tokenizer, loaded.template, max_reason_tokens=MAX_REASON_TOKENS)


def engine_of(live: LiveScorer, max_batch: int = 8, batch_tokens: int = 100) -> Engine:
    live.drop(range(100))
    encode = lambda prompt: live.template.prompt_segment(prompt).input_ids  # noqa: E731
    return Engine(live, encode, max_batch=max_batch, batch_tokens=batch_tokens)


def asked(engine: Engine, *texts: str, question: Question = OFF) -> list[set[int]]:
    """Ask for each text at once; the names that are done after each turn."""
    for name, text in enumerate(texts):
        engine.obey(Ask(name, user(text), question))
    turns = []
    while not engine.is_idle:
        turns.append({name for name, _ in engine.turn()})
    return turns


def test_what_waits_is_read_together_up_to_the_budget(live: LiveScorer) -> None:
    length = len(live.template.prompt_segment(user(SHORT)).input_ids)
    assert asked(engine_of(live, batch_tokens=3 * length), *[SHORT] * 7) == [{0, 1, 2}, {3, 4, 5}, {6}]
    assert asked(engine_of(live, max_batch=2), *[SHORT] * 3) == [{0, 1}, {2}]
    assert asked(engine_of(live, max_batch=1), SHORT, SHORT) == [{0}, {1}]


def test_a_prompt_beyond_the_budget_is_read_alone_and_in_its_turn(live: LiveScorer) -> None:
    assert asked(engine_of(live), SHORT, LONG, SHORT) == [{0}, {1}, {2}]


def test_a_verdict_without_a_reason_does_not_wait_for_reasons(live: LiveScorer) -> None:
    engine = engine_of(live)
    engine.obey(Ask(50, user(SHORT), ON))
    assert engine.turn() == []
    engine.obey(Ask(51, user(LONG[:60]), OFF))
    assert [name for name, _ in engine.turn()] == [51]
    assert len(live) == 1


def test_reasons_are_written_together_up_to_max_batch(live: LiveScorer) -> None:
    engine = engine_of(live, max_batch=2)
    for name in range(3):
        engine.obey(Ask(name, user(SHORT), ON))
    engine.turn()
    assert len(live) == 2
    engine.obey(Drop(0))
    engine.turn()
    assert len(live) == 2, "the third has taken the place of the first"
    engine.obey(Drop(2))
    engine.obey(Drop(1))
    assert engine.is_idle


def test_rows_are_bounded_and_a_long_ones_room_is_given_back(live: LiveScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are as long as the longest: a long prompt waits until it is alone, and is read then."""
    long = len(live.template.prompt_segment(user(LONG)).input_ids)
    monkeypatch.setattr(live_module, "ROW_TOKENS", 2 * (long + MAX_REASON_TOKENS) - 1)
    engine = engine_of(live, batch_tokens=1000)
    for name, text in enumerate((SHORT, LONG, SHORT)):
        engine.obey(Ask(name, user(text), ON))
    lengths, done = [], []
    while not engine.is_idle:
        done += [name for name, _ in engine.turn()]
        lengths.append(len(live) * live._rows.longest)
    assert done == [0, 1, 2]
    assert max(lengths) < 2 * (long + MAX_REASON_TOKENS)
    monkeypatch.setattr("guardtrain.inference.rows.KEPT_ROOM", 10)
    assert asked(engine_of(live), SHORT, question=ON)[-1] == {0}
    assert live._rows.own[0][0].numel() == 0


def test_a_very_long_prompt_is_read_in_parts_and_can_be_dropped(live: LiveScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons go on in between; scores and reasons are those of one forward."""
    monkeypatch.setattr(live_module, "SLICE_TOKENS", 10_000)
    both = Question(frozenset(Mode))
    whole = engine_of(live)
    whole.obey(Ask(0, user(LONG), both))
    expected = {}
    while not whole.is_idle:
        expected |= dict(whole.turn())
    monkeypatch.setattr(live_module, "SLICE_TOKENS", 50)
    engine = engine_of(live)
    engine.obey(Ask(50, user(SHORT), ON))
    engine.turn()
    engine.obey(Ask(0, user(LONG), both))
    found, turns = {}, 0
    while not engine.is_idle:
        found |= dict(engine.turn())
        turns += 1
        assert turns > 4 or 0 not in found
    assert found.keys() == {0, 50}
    assert found[0].reason == expected[0].reason
    assert found[0].scores == pytest.approx(expected[0].scores, abs=1e-4)
    engine.obey(Ask(1, user(LONG), OFF))
    assert engine.turn() == []
    engine.obey(Drop(1))
    assert engine.is_idle
    assert asked(engine, SHORT) == [{0}]
