"""The ranks of a run: joining the others, and agreeing with them. A process that no launcher started is a world of one.

The process group is made here and not by a library on the way: its timeout is the recipe's on every path, and on GPUs plain
Python values travel over gloo, so that ranks can still talk about what went wrong on the device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from guardtrain.errors import DistributedError, GuardtrainError

Result = TypeVar("Result")

LEAVING_SECONDS = 10.0
STORE_SECONDS = 0.2  # between two looks whether the main rank is done


@dataclass(frozen=True)
class Ranks:
    """index: this process; size: how many there are; local_index: this process on its node; launched: by a launcher."""

    index: int
    size: int
    local_index: int
    launched: bool

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.index == 0


def launched() -> Ranks:
    """What the launcher says in the environment, before anybody has joined."""
    if "LOCAL_RANK" not in os.environ:
        return Ranks(0, 1, 0, launched=False)
    index, size, local_index = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Ranks(index, size, local_index, launched=True)


def join(*, timeout_seconds: float) -> Ranks:
    """Meet the other ranks; returns at once where no launcher started this process. Raises DistributedError.

    timeout_seconds: how long a rank waits for the others, here and in every collective.
    """
    ranks = launched()
    if not ranks.launched:
        _refuse_strays()
    if not ranks.launched or dist.is_initialized():
        return ranks
    has_gpu = torch.cuda.is_available()
    if has_gpu and ranks.local_index >= torch.cuda.device_count():
        where, expected = f"rank {ranks.index}", f"at most {torch.cuda.device_count()} ranks on this machine"
        raise DistributedError("no GPU is left for it", where=where, expected=expected, found=f"rank {ranks.local_index} of them")
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed's groups are clones without a timeout of their own: they take torch's default.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)
    try:
        if has_gpu:
            torch.cuda.set_device(ranks.local_index)
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=timeout)
        _tell_accelerate(has_gpu)
    except (RuntimeError, ValueError) as error:  # torch's own kinds of errors are all of these
        meeting = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        first = str(error).splitlines()[0]
        raise DistributedError("the other ranks were not met", where=f"rank {ranks.index} at {meeting}", found=first) from error
    return ranks


def _refuse_strays() -> None:
    """Raise where the environment speaks of other processes that this one could not meet."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        hint = "sbatch slurm/train.sbatch, or guardtrain launch --slurm, starts one launcher on each node"
        raise DistributedError(f"Slurm started {tasks} tasks that know nothing of each other", where="srun", hint=hint)
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        expected = "accelerate launch or guardtrain launch, which set LOCAL_RANK too, or no such variable"
        raise DistributedError("ranks that no launcher started", where="WORLD_SIZE", expected=expected, found=size)


def _tell_accelerate(has_gpu: bool) -> None:
    """Have accelerate, and DeepSpeed where it is asked for, take the group that is there."""
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if uses_deepspeed:
        # 2026-11: DeepSpeed 0.19 uses old names of torch's collectives, and says "mismatch" of what it is told once, by its file.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    if uses_deepspeed and not has_gpu:
        from deepspeed.ops import __compatible_ops__

        # Only inference uses it, and it would be compiled, by every rank.
        __compatible_ops__["deepspeed_shm_comm"] = False
    # 2026-11: accelerate 1.15 finds neither gloo nor the number of ranks by itself when DeepSpeed runs on a CPU.
    PartialState(cpu=not has_gpu and not uses_deepspeed, backend=None if has_gpu else "gloo")


def leave() -> None:
    """Part from the other ranks, all at once. Not after an error of this rank alone: the others may wait for it elsewhere."""
    if dist.is_initialized():
        _meet_in_the_store()
        dist.destroy_process_group()


def _meet_in_the_store() -> None:
    """Wait for all ranks, for a while: one that is gone too soon resets connections that another one is still reading from."""
    store, ranks = dist.distributed_c10d._get_default_store(), launched()
    keys = [f"guardtrain/leaving/{rank}" for rank in range(ranks.size)]
    with contextlib.suppress(RuntimeError):  # the store's host is gone: nobody is left to wait for
        store.set(keys[ranks.index], "1")
        store.wait(keys, timedelta(seconds=LEAVING_SECONDS))


def wait_for_main(action: Callable[[], Result], name: str) -> Result | None:
    """Run `action` on the main rank while the others wait, for as long as it takes and outside of any collective's timeout.

    name: of what is waited for, another one at each call. Where `action` raises, the others go on.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    store, key = dist.distributed_c10d._get_default_store(), f"guardtrain/{name}"
    if not launched().is_main:
        while not store.check([key]):  # a store whose host is gone raises
            time.sleep(STORE_SECONDS)
        return None
    try:
        return action()
    finally:
        store.set(key, "1")


def gather(value: Any) -> list[Any]:
    """The values of all ranks, by rank; every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether it is true on some rank; every rank must call it, and all get the same answer."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    answer = torch.tensor(int(flag))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def barrier() -> None:
    """Wait for all ranks."""
    gather(None)


def together(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank. Where it fails on one, all of them raise, so that nobody waits for a rank that is gone.

    Raises this rank's own GuardtrainError, or OSError as DistributedError, else the first other rank's. The main rank is the one
    to print it: on the others the error is marked as said.
    """
    result: Result | None = None
    failed: GuardtrainError | None = None
    try:
        result = action()
    except GuardtrainError as error:
        failed = error
    except OSError as error:
        where = str(error.filename or f"rank {launched().index}")
        failed = DistributedError("cannot be read or written", where=where, found=error.strerror or str(error))
    errors: list[GuardtrainError | None] = gather(failed)
    first = failed or next((error for error in errors if error is not None), None)
    if first is not None:
        first.is_said, first.is_agreed = not launched().is_main, True
        raise first
    return result  # type: ignore[return-value]  # None only where `action` returns it


def main_first(action: Callable[[], Result]) -> Result:
    """Run `action` on the main rank, then on the others, which find what it left in the cache. All raise when one does."""
    is_main = launched().is_main
    result = together(action if is_main else lambda: None)
    others = together(lambda: None if is_main else action())
    return result if is_main else others  # type: ignore[return-value]  # the branch that ran `action`
