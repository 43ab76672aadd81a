"""The error tree. Every error carries its address (a file and line, a recipe key, a step) and ends the CLI with exit code 2."""

from __future__ import annotations


class GuardtrainError(Exception):
    """Base of every error that guardtrain raises on purpose.

    what: what is wrong, in one line.
    where: its address, for example ``prompts.jsonl:7`` or ``train.learning_rate``.
    expected, found: what should have been there and what was.
    hint: what to do about it.
    is_said: another process prints it. is_agreed: all ranks raise, and end by themselves.
    """

    is_said = False
    is_agreed = False

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.hint = what, where, expected, found, hint
        super().__init__(self._line())

    def _line(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        line = ", ".join(parts)
        return f"{line} ({self.hint})" if self.hint else line


class ConfigError(GuardtrainError):
    """A recipe, an override or a combination of settings that cannot be run."""


class DataError(GuardtrainError):
    """A data file or row that cannot be used."""


class ModelError(GuardtrainError):
    """A model or tokenizer that is missing or cannot serve as a guard."""


class CheckpointError(GuardtrainError):
    """A checkpoint that cannot be written, found or trusted."""


class TrainingError(GuardtrainError):
    """A step that cannot be trained: a loss that is not a number, memory that does not suffice."""


class DistributedError(GuardtrainError):
    """A rank, launcher or collective that failed."""


class ServeError(GuardtrainError):
    """A serving request or backend that failed."""
