"""What the frozen probe reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guardtrain.compare import drift
from guardtrain.compare.drift import FrozenProbe, fit_on, last_states, read_probe, write_probe
from guardtrain.secure.prompts import Prompts

MakeTiny = Callable[..., Any]
IDS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16]]


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_the_last_tokens_state_whatever_the_batch(
    make_tiny: MakeTiny, layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("llama")
    found = last_states(model, IDS, layer)
    for ids, state in zip(IDS, found, strict=True):
        with torch.no_grad():
            output = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        expected = output.hidden_states[1] if layer == 1 else output.last_hidden_state
        assert state == pytest.approx(expected[0, -1].numpy(), abs=1e-4)
    monkeypatch.setattr(drift, "BATCH_TOKENS", 1)
    assert last_states(model, IDS, layer) == pytest.approx(found, abs=1e-4)


def test_the_mean_of_its_values_is_the_balanced_accuracy(make_tiny: MakeTiny, tmp_path: Path) -> None:
    from sklearn.metrics import balanced_accuracy_score

    model = make_tiny("llama")
    generator = np.random.default_rng(0)
    ids = [generator.integers(20, 400, size=4).tolist() for _ in range(60)]
    is_malicious_N = np.array([ids[row][-1] > 150 for row in range(60)])
    prompts = Prompts(ids, is_malicious_N)
    probe = fit_on(model, prompts)
    write_probe(probe, tmp_path / "probe.npz")
    kept = read_probe(tmp_path / "probe.npz")
    frozen = FrozenProbe(kept, prompts, Prompts(ids[:9], is_malicious_N[:9]))
    values = frozen.values(model)
    margins_N = probe.margins(last_states(model, ids))
    assert values["probe"].mean() == pytest.approx(balanced_accuracy_score(is_malicious_N, margins_N > 0))
    assert 0 < is_malicious_N.mean() != 0.5, "classes of unequal size"
    assert values["probe_margin"].mean() == pytest.approx(
        (probe.margins(last_states(model, ids)) * np.where(is_malicious_N, 1, -1)).mean()
    )
    assert len(values["probe_elsewhere"]) == 9
