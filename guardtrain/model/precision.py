"""Which number format to compute in: measured on a CPU, asked of a GPU, and said."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Precision:
    """compute: the dtype of matrix products (by autocast when it is not float32); why: one line for people."""

    compute: torch.dtype
    why: str

    @property
    def name(self) -> DtypeName:
        """As a recipe spells it."""
        names: dict[torch.dtype, DtypeName] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
        return names[self.compute]

    @property
    def autocast(self) -> bool:
        """Whether products are computed in less than float32."""
        return self.compute is not torch.float32


def choose_precision(wanted: DtypeName) -> Precision:
    """The dtype to compute in. `auto` takes bfloat16 where it is native and faster, else float16 on a GPU, else float32."""
    if wanted != "auto":
        return Precision(getattr(torch, wanted), "as the recipe asks")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, f"{name} computes bfloat16 natively")
        return Precision(torch.float16, f"{name} has no native bfloat16")
    speedup = bfloat16_speedup_on_cpu()
    if speedup >= 1.3:
        return Precision(torch.bfloat16, f"this CPU multiplies bfloat16 {speedup:.1f}x as fast as float32")
    return Precision(torch.float32, f"bfloat16 runs at {speedup:.1f}x the speed of float32 on this CPU")


def bfloat16_speedup_on_cpu() -> float:
    """Speed of a bfloat16 matrix product relative to float32, best of three each (about 30 ms in all).

    2026-11: on CPUs without bf16 instructions training in it was about 20x slower, on those with them 1.9x faster.
    """
    return _best_seconds(torch.float32) / _best_seconds(torch.bfloat16)


def _best_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    torch.mm(a, b)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
