"""Counting the bytes of tensors, on programs whose tensors can be counted by hand."""

from __future__ import annotations

import torch

from guardtrain.bench.account import TensorAccount

KIB = 2**10


def of_bytes(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def test_what_is_freed_is_forgotten_and_the_most_is_remembered() -> None:
    with TensorAccount() as account:
        a, b = of_bytes(3 * KIB), of_bytes(5 * KIB)
        assert account.live == account.peak == 8 * KIB
        del b
        assert (account.live, account.peak) == (3 * KIB, 8 * KIB)
        account.reset_peak()
        assert account.peak == 3 * KIB
        assert a.sum() == 0
    del a
    assert account.live <= 16  # the scalar of the assertion


def test_a_storage_counts_once_whoever_looks_at_it() -> None:
    with TensorAccount() as account:
        a = of_bytes(4 * KIB)
        views = [a.view(4, KIB), a[:10], a.view(4, KIB).t()]
        assert account.live == 4 * KIB
        del a
        assert account.live == 4 * KIB
        del views
        assert account.live == 0


def test_tensors_from_before_count_when_they_are_used() -> None:
    a = of_bytes(2 * KIB)
    with TensorAccount() as account:
        b = a + 1
        assert account.live == 4 * KIB
    del a, b


def test_what_the_backward_keeps_is_counted_until_it_has_run() -> None:
    x = torch.ones(KIB, requires_grad=True)
    with TensorAccount() as account:
        y = (x * 2).exp()  # exp keeps its output
        loss = y.sum()
        del y
        assert account.live == 2 * 4 * KIB + 4  # x, what exp keeps, the loss
        loss.backward()
        del loss
        assert x.grad is not None
        assert account.live <= 2 * 4 * KIB + 8  # x and its gradient


def test_a_storage_that_is_resized_counts_as_it_is() -> None:
    with TensorAccount() as account:
        a = of_bytes(KIB)
        a.resize_(3 * KIB)
        assert account.live == 3 * KIB


def test_other_devices_do_not_count() -> None:
    with TensorAccount() as account:
        torch.zeros(KIB, device="meta")
        assert account.peak == 0
