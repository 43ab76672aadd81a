"""What a guard in production says of one prompt, and what it says when it cannot tell."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from guardtrain.types import Label


class Status(StrEnum):
    """Whether there is a verdict. `truncated`: there is, but its reason was cut at the cap and the verdict forced behind it."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    TRUNCATED = "truncated"


class Failure(StrEnum):
    """Why there is no verdict.

    model: its process died or raised. overloaded: the queue is full. too_long: more tokens than are read. unreadable: no text.
    """

    MODEL = "model"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"
    TOO_LONG = "too_long"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One prompt judged, or not: an outage looks neither like an attack nor like safety.

    decision: None exactly where status is error or timeout. failure: which, there.
    p_malicious: of the mode that decided; None without calibration or decision. score, threshold: flagged from the threshold on.
    reason: the model's sentence, None where none was written. mode: off, on, both or cascade, as asked for.
    escalated: a cascade that was decided with a reason. latency_ms: from call to verdict, queue included.
    threshold_version: of the calibration, its date and a short hash; "uncalibrated".
    """

    decision: Label | None
    status: Status
    failure: Failure | None = None
    p_malicious: float | None = None
    score: float | None = None
    threshold: float | None = None
    reason: str | None = None
    mode: str | None = None
    escalated: bool = False
    latency_ms: float = 0.0
    model: str = ""
    threshold_version: str = "uncalibrated"

    def blocks(self, fails_open: Collection[Failure] = ()) -> bool:
        """Whether the prompt must not pass: it is malicious, or there is no decision and the failure is not in `fails_open`."""
        if self.decision is not None:
            return self.decision is Label.MALICIOUS
        return self.failure not in fails_open

    def to_json(self) -> dict[str, Any]:
        """Every field, under its name."""
        return asdict(self)
