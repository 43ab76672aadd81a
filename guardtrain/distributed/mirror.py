"""Checkpoints in a second place, copied while training goes on: another disk, or the mount of a bucket.

The mirror is a run folder of its own, so a run whose first disk is lost goes on from there: `output.dir=MIRROR --resume`.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from guardtrain.distributed.checkpoint import MANIFEST, prune, read_manifest
from guardtrain.errors import CheckpointError

log = logging.getLogger(__name__)


class Mirror:
    """Copies what a run leaves to `target`, one after the other, in a thread of the main rank.

    run: the run folder, with `checkpoints` and a few small files. keep: checkpoints that stay in the mirror. copying: the one
    that must not be pruned now. The thread ends with the process: nobody waits for a place that hangs, except in `finish`.
    """

    def __init__(self, run: Path, target: Path, keep: int) -> None:
        self.run, self.target, self.keep = run, target, keep
        self.copying: Path | None = None
        self._next: Path | None = None
        self._ends = False
        self._changed = threading.Condition()
        self._done = threading.Event()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def copy_later(self, folder: Path) -> None:
        """Copy a whole checkpoint, in the place of an older one that has not been begun: the newest is what counts."""
        with self._changed:
            self._next = folder
            self._changed.notify()

    def finish(self, seconds: float | None = None) -> None:
        """Copy the finished model too, and wait for all of it, at most so long."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        if not self._done.wait(seconds):
            log.warning("%s: the last checkpoint is still being copied after %.0f s", self.target, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._ends)
                self.copying, self._next = self._next, None
            if self.copying is None:
                break
            self._copy(self.copying)
            self.copying = None
        with self._only_warn("the model"):
            self._copy_files()
            if (self.run / "model").is_dir():
                shutil.copytree(self.run / "model", self.target / "model", dirs_exist_ok=True)
        self._done.set()

    def _copy(self, folder: Path) -> None:
        with self._only_warn(folder.name):
            copy_checkpoint(folder, self.target / folder.parent.name)
            self._copy_files()
            prune(self.target / folder.parent.name, self.keep)

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
        except CheckpointError as error:
            log.warning("%s was not copied to %s: %s", what, self.target, error)


def copy_checkpoint(folder: Path, root: Path) -> Path:
    """Copy what a checkpoint's manifest names below `root`; the manifest comes last, for on a bucket no folder can be renamed.

    Until it is there, nobody takes the folder for a checkpoint. Returns the copy. Raises OSError, CheckpointError.
    """
    target = root / folder.name
    (target / MANIFEST).unlink(missing_ok=True)
    for name in read_manifest(folder).files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / name, target / name)
    shutil.copy2(folder / MANIFEST, target / MANIFEST)
    return target
