"""What every mistake must look like to who makes it."""

from __future__ import annotations

from typing import Any


def check_refused(called: Any, *words: str) -> None:
    """Exit code 2, and a last line on the error stream that holds all `words`. called: from the fixture `guardtrain`."""
    assert called.code == 2, called.err
    last = called.err.strip().splitlines()[-1]
    for word in words:
        assert word in last, last
    assert "Traceback" not in called.err
