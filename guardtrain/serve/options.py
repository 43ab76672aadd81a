"""What a guard in production is allowed: how much it reads, how many wait, how long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guardtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """Limits of a guard.

    timeout_seconds: from the call to the verdict. queue: prompts, or chunks of long ones, that are waited for at once.
    max_batch: reasons written at once, and prompts read at once; 1 serves one after the other. batch_tokens: of these prompts.
    max_characters, max_tokens: of a prompt, the latter normalised; more is too long. chunk_tokens: longer prompts are read in
    chunks, the worst of which counts; the guard's own limit if absent. normalise: read what invisible characters and encodings
    hide. cache: verdicts that are remembered. hang_seconds: without a sign of life a model process is ended. threads: of the
    model; torch's own choice if absent.
    """

    timeout_seconds: float = 30.0
    queue: int = 256
    max_batch: int = 32
    batch_tokens: int = 512
    max_characters: int = 400_000
    max_tokens: int = 32_768
    chunk_tokens: int | None = None
    normalise: bool = True
    cache: int = 10_000
    hang_seconds: float = 60.0
    threads: int | None = None

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise ConfigError("; ".join(problems))

    def problems(self) -> Iterator[str]:
        """What cannot be run."""
        for name in ("queue", "max_batch", "batch_tokens", "max_characters", "max_tokens"):
            if getattr(self, name) < 1:
                yield f"{name}: expected at least 1, found {getattr(self, name)}"
        for name in ("timeout_seconds", "hang_seconds"):
            if not getattr(self, name) > 0:
                yield f"{name}: expected a number above 0, found {getattr(self, name)}"
        if self.cache < 0:
            yield f"cache: expected 0 or more, found {self.cache}"
