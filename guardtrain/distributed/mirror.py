"""Checkpoints in a second place, copied while training goes on: another disk, or the mount of a bucket.

The mirror is a run folder of its own, so a run whose first disk is lost goes on from there: `output.dir=MIRROR --resume`.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillCopying
from pathlib import Path

from guardtrain.distributed.checkpoint import MANIFEST, prune

log = logging.getLogger(__name__)


class Mirror:
    """Copies what a run leaves to `target`, in the order in which it was asked to, in one thread of the main rank.

    run: the run folder, with `checkpoints` and a few small files. keep: checkpoints that stay in the mirror.
    """

    def __init__(self, run: Path, target: Path, keep: int) -> None:
        self.run, self.target, self.keep = run, target, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._last: Future[None] | None = None

    def copy_later(self, folder: Path) -> None:
        """Copy a whole checkpoint, and drop an older one that has not been begun: the newest is what counts."""
        if self._last is not None:
            self._last.cancel()
        self._last = self._thread.submit(self._copy, folder)

    def finish(self, seconds: float | None = None) -> None:
        """Copy the finished model, and wait for all copies, at most so long."""
        last = self._thread.submit(self._copy_model)
        try:
            last.result(timeout=seconds)
        except StillCopying:
            log.warning("%s: the last checkpoint is still being copied after %.0f s", self.target, seconds)
        self._thread.shutdown(wait=False)

    def _copy(self, folder: Path) -> None:
        with self._only_warn(folder.name):
            copy_checkpoint(folder, self.target / folder.parent.name)
            self._copy_files()
            prune(self.target / folder.parent.name, self.keep)

    def _copy_model(self) -> None:
        with self._only_warn("the model"):
            self._copy_files()
            if (self.run / "model").is_dir():
                shutil.copytree(self.run / "model", self.target / "model", dirs_exist_ok=True)

    def _copy_files(self) -> None:
        """Recipe, state, metrics: what stands in the run folder itself."""
        self.target.mkdir(parents=True, exist_ok=True)
        for file in self.run.iterdir():
            if file.is_file():
                shutil.copy2(file, self.target / file.name)

    @contextlib.contextmanager
    def _only_warn(self, what: str) -> Iterator[None]:
        """A mirror that fails must not end a run that trains."""
        try:
            yield
        except OSError as error:  # shutil.Error, of several files, is one too
            log.warning("%s was not copied to %s: %s", what, self.target, error.strerror or str(error).splitlines()[0])


def copy_checkpoint(folder: Path, root: Path) -> Path:
    """Copy a checkpoint below `root`; the manifest comes last, for renaming a folder is no single act on a bucket.

    Until it is there, nobody takes the folder for a checkpoint. Returns the copy. Raises OSError.
    """
    target = root / folder.name
    (target / MANIFEST).unlink(missing_ok=True)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
    shutil.copy2(folder / MANIFEST, target / MANIFEST)
    return target
