"""Freed memory stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from guardtrain.train.memory import keep_freed_memory
import torch
if {keep}:
    assert keep_freed_memory()
def step():
    tensors = [torch.ones(16 * 2**20) for _ in range(4)]  # 64 MiB each
for _ in range(8):  # until the blocks lie as they fit best
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*, keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_later_steps_fault_no_page_in_again() -> None:
    """768 MiB in three later steps: at least one fault for each huge page without, next to none with."""
    assert page_faults(keep=True) < 50 < 300 < page_faults(keep=False)
