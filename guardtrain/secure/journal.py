"""What of a search is measured, so that the same command goes on after a kill."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from guardtrain.errors import ConfigError, DataError
from guardtrain.json_files import append_synced, beside, whole_entries
from guardtrain.secure.perturb import interrupts_held_back
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.result import digest_of
from guardtrain.secure.search import Task

log = logging.getLogger(__name__)

FORMAT = 2
WORTH_KEEPING = 2  # measurements; the untouched model is measured in seconds


class Journal:
    """`OUT.journal`: one line for what the search is of, one for each measurement, on the disk before the next is waited for.

    settings: plain data; a journal with others is refused. Raises ConfigError for that and where another search holds the file,
    DataError where it cannot be written.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.path = beside(out, "journal")
        self.known: dict[str, ProbeFigures] = {}
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._lock()
            self._take_up(settings)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
        if kind is not None and len(self.known) < WORTH_KEEPING:
            self.discard()
        elif kind is KeyboardInterrupt:
            log.info("stopped: %d measurements are kept in %s, and the same command goes on", len(self.known), self.path)

    def find(self, task: Task) -> ProbeFigures | None:
        """What was measured for it."""
        return self.known.get(task_key(task))

    def add(self, task: Task, figures: ProbeFigures) -> None:
        """Keep what was measured. Raises DataError where it cannot be written."""
        key = task_key(task)
        with interrupts_held_back():  # what is on the disk is what is counted
            self._say({"key": key, **asdict(figures)})
            self.known[key] = figures

    def discard(self) -> None:
        """Leave nothing behind: the search is done."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError("another search is writing this file", where=str(self.path)) from error

    def _take_up(self, settings: Mapping[str, Any]) -> None:
        entries = whole_entries(self.path.read_bytes())
        os.ftruncate(self._file, entries[-1][0] if entries else 0)
        if not entries:
            self._say({"format": FORMAT, "settings": dict(settings)})
            return
        (_, header), *measured = entries
        self._check(header, settings)
        for _, entry in measured:
            key = entry.pop("key")
            self.known[key] = ProbeFigures(**entry)

    def _check(self, header: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        hint = f"go on with the same command, or delete {self.path} to begin anew"
        if header.get("format") != FORMAT:
            raise ConfigError("an unfinished search of another version", where=str(self.path), hint=hint)
        begun = header["settings"]
        for name, value in settings.items():
            if begun.get(name) != value:
                what = f"an unfinished search has other {name}"
                raise ConfigError(what, where=str(self.path), expected=str(begun.get(name)), found=str(value), hint=hint)

    def _say(self, entry: Mapping[str, Any]) -> None:
        try:
            append_synced(self._file, json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> DataError:
        return DataError("cannot be written", where=str(self.path), found=error.strerror)


def task_key(task: Task) -> str:
    """The same whatever order the units are in."""
    return digest_of([sorted(map(str, task.units)), task.strength, task.seed, task.prompts])
