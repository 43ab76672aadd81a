"""How much more memory a process takes at most, as the kernel counts it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def peak_growth_bytes(action: Callable[[], Any]) -> int:
    """By how much the resident memory, mapped files included, is larger at its peak during `action` than before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    before = _kilobytes("VmRSS")
    action()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(key: str) -> int:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1])
