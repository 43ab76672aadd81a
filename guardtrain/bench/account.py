"""Counts the bytes of tensors while a program runs: what a memory plan is measured against where no GPU keeps count."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorAccount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is open, `live` bytes are those of all tensor storages that operators have taken or given, and `peak` the most.

    Each storage counts once, from when it is first seen until it is freed, whoever holds it: Python, the autograd graph, an
    engine. What an operator allocates and frees inside itself is not seen. Storages of other devices than `device` and of no
    bytes do not count.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count what it has taken and given."""
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs, result)):
            if tensor.device.type == self.device:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def reset_peak(self) -> None:
        """Forget an earlier peak: from here on what lives now is the least."""
        self.peak = self.live

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None and size:
            # torch keeps a storage's Python object for as long as the storage lives.
            weakref.finalize(storage, self._forget, key).atexit = False
        if known != size and (size or known):  # new, or resized
            self._sizes[key] = size
            self.live += size - (known or 0)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
