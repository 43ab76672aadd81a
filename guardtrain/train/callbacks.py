"""What watches a run: metrics as JSONL, a progress bar, the collapse watch, and Ctrl-C."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from guardtrain.distributed.preemption import StopReason, StopRequests

log = logging.getLogger(__name__)


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Appends every log record to metrics.jsonl, with step, seconds since the start and computed tokens per second."""

    def __init__(self, path: Path, count_tokens: Callable[[], int]) -> None:
        self.path = path
        self.count_tokens = count_tokens
        self._start = time.perf_counter()
        self._last = (self._start, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._last = (self._start, self.count_tokens())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs:
            return
        record: dict[str, Any] = {"step": state.global_step, "seconds": round(time.perf_counter() - self._start, 2), **logs}
        if "loss" in logs:
            record["tokens_per_second"] = round(self._tokens_per_second() * args.world_size, 1)  # packs are about alike
        append_json_line(self.path, record)

    def _tokens_per_second(self) -> float:
        now, tokens = time.perf_counter(), self.count_tokens()
        (then, before), self._last = self._last, (now, tokens)
        return (tokens - before) / max(now - then, 1e-9)


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Steps, loss, tokens per second and time left, on the error stream so that results can be piped."""

    def __init__(self, count_tokens: Callable[[], int], console: Console) -> None:
        self.count_tokens = count_tokens
        self.progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._loss = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._start, self._tokens = time.perf_counter(), self.count_tokens()
            self._task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, status="")
            self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remember the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            rate = (self.count_tokens() - self._tokens) * args.world_size / max(time.perf_counter() - self._start, 1e-9)
            status = f"loss {self._loss:.3f}  {rate:,.0f} tokens/s"
            self.progress.update(self._task, completed=state.global_step, status=status)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on screen."""
        if state.is_world_process_zero:
            self.progress.stop()


@dataclass(frozen=True)
class Watched:
    """What the collapse watch saw: the flagged fraction at score 0, and AUROC on its slice of validation rows."""

    step: int
    flagged: float
    auroc: float
    gap: float

    @property
    def problem(self) -> str | None:
        """One line when the guard says the same of everything, or nothing that is a number."""
        if not math.isfinite(self.gap):
            return f"the guard's scores are not numbers at step {self.step}: training has diverged"
        if self.flagged in (0.0, 1.0):
            return f"the guard flags {'everything' if self.flagged else 'nothing'} at step {self.step}"
        return None


class CollapseWatch(TrainerCallback):  # type: ignore[misc]
    """Looks at the flagged fraction and the separation of scores on a slice of validation rows, and says when it collapses.

    score: returns one score (mode off) for each watched row, with the model as it is now.
    """

    def __init__(self, score: Callable[[], Sequence[float]], is_malicious: Sequence[bool], every_steps: int, path: Path) -> None:
        self.score = score
        self.is_malicious = list(is_malicious)
        self.every_steps = every_steps
        self.path = path
        self.seen: list[Watched] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look when it is time, and once at the end."""
        if state.global_step % self.every_steps == 0 or state.global_step == state.max_steps:
            self.look(state.global_step, is_main=state.is_world_process_zero)

    def look(self, step: int, *, is_main: bool = True) -> Watched:
        """Score the slice, log it, and warn loudly on collapse."""
        from sklearn.metrics import roc_auc_score

        scores = self.score()
        flagged = sum(score > 0 for score in scores) / len(scores)
        malicious = [score for score, label in zip(scores, self.is_malicious, strict=True) if label]
        benign = [score for score, label in zip(scores, self.is_malicious, strict=True) if not label]
        gap = sum(malicious) / len(malicious) - sum(benign) / len(benign)
        auroc = float(roc_auc_score(self.is_malicious, scores)) if all(map(math.isfinite, scores)) else math.nan
        watched = Watched(step, flagged, auroc, gap)
        self.seen.append(watched)
        if is_main:
            figures = {"watch_flagged": flagged, "watch_auroc": watched.auroc, "watch_gap": gap}
            append_json_line(self.path, {"step": step, **{key: round(value, 4) for key, value in figures.items()}})
            if watched.problem:
                log.warning("COLLAPSE: %s (AUROC there %.2f)", watched.problem, watched.auroc)
        return watched

    @property
    def problem(self) -> str | None:
        """The problem that the last look saw: what marks the run."""
        return self.seen[-1].problem if self.seen else None


class StopWhenAsked(TrainerCallback):  # type: ignore[misc]
    """Saves at the next step boundary and ends the run when something asks for it.

    reason: what it was, None while nothing has.
    """

    def __init__(self, requests: StopRequests) -> None:
        self.requests = requests
        self.reason: StopReason | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the signals over."""
        self.requests.listen()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end, on all ranks when one of them has a reason."""
        self.reason = self.requests.agreed_reason()
        if self.reason is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self.requests.stop_listening()


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as a line; NaN and infinity become null, so that every reader takes it."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")
