"""JSON Lines on the error stream: what was decided, how fast, and the hash of the text; texts only where they are wanted."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardtrain.serve.gate import Judged

HASH_DIGITS = 16
LOGGERS = ("guardtrain", "uvicorn", "py.warnings")


class JsonFormatter(logging.Formatter):
    """One object a line. Of an exception the kind and the places only: its message may hold a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without an end."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {"time": when, "level": record.levelname.lower(), "event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1] is not None:
            entry |= described(record.exc_info[1])
        return json.dumps(entry, default=str)  # ASCII, so that half of a surrogate pair cannot break the stream


def log_as_json() -> None:
    """Send everything that a server says to the error stream, as JSON Lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.captureWarnings(True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def described(error: BaseException) -> dict[str, Any]:
    """An exception without its words: kind, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    return {"error": type(error).__name__, "at": [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames[-5:]]}


def entry(judged: Judged, *, with_prompt: bool) -> dict[str, Any]:
    """What the log keeps of one judged text."""
    verdict, text = judged.verdict, judged.piece.text
    kept: dict[str, Any] = {
        "id": judged.id,
        "where": judged.piece.where,
        "role": judged.piece.role,
        "sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS],
        "characters": None if text is None else len(text),
        "decision": verdict.decision,
        "status": verdict.status,
        "failure": verdict.failure,
        "blocked": judged.blocks,
        "failed_open": judged.failed_open,
        "score": verdict.score,
        "p_malicious": verdict.p_malicious,
        "mode": verdict.mode,
        "escalated": verdict.escalated,
        "latency_ms": round(verdict.latency_ms, 2),
        "threshold_version": verdict.threshold_version,
    }
    return {**kept, "prompt": text, "reason": verdict.reason} if with_prompt else kept
