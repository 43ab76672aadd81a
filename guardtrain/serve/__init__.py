"""The guard in production: `from guardtrain.serve import Guard`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardtrain.serve.guard import Guard
    from guardtrain.serve.options import GuardOptions
    from guardtrain.serve.verdict import Failure, Status, Verdict

__all__ = ["Failure", "Guard", "GuardOptions", "Status", "Verdict"]
_HOMES = {"Guard": "guard", "GuardOptions": "options", "Failure": "verdict", "Status": "verdict", "Verdict": "verdict"}


def __getattr__(name: str) -> Any:
    """Loads what is asked for: the command line imports this package, and answers `--help` without numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
