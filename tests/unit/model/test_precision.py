"""The number format: what was asked for, else what is measured to be fast, and said."""

from __future__ import annotations

import pytest
import torch

from guardtrain.model import precision
from guardtrain.model.precision import bfloat16_speedup_on_cpu, choose_precision


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_speedup_on_cpu", lambda: pytest.fail("nothing is to be measured"))
    chosen = choose_precision(name)  # type: ignore[arg-type]
    assert chosen.compute is getattr(torch, name)
    assert chosen.autocast is (name != "float32")


@pytest.mark.parametrize(("speedup", "dtype"), [(0.05, torch.float32), (1.0, torch.float32), (1.9, torch.bfloat16)])
@pytest.mark.usefixtures("no_gpu")
def test_a_cpu_computes_in_what_is_faster(speedup: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_speedup_on_cpu", lambda: speedup)
    chosen = choose_precision("auto")
    assert chosen.compute is dtype
    assert f"{speedup:.1f}x" in chosen.why


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_native_bfloat16_takes_float16(native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 answers that bfloat16 is supported, because it is emulated there: slowly."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    chosen = choose_precision("auto")
    assert chosen.compute is dtype
    assert "Tesla T4" in chosen.why


def test_the_measurement_measures() -> None:
    """About 30 ms; whichever way it comes out on this machine."""
    assert 0.001 < bfloat16_speedup_on_cpu() < 100


def test_the_measurement_is_the_ratio_of_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 3.0, torch.bfloat16: 1.5}
    monkeypatch.setattr(precision, "_best_seconds", lambda dtype: seconds[dtype])
    assert bfloat16_speedup_on_cpu() == 2.0
