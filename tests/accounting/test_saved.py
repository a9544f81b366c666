from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F

from petl_kernels.accounting.saved import saved_bytes


def test_counts_each_storage_once_and_whole():
    x = torch.randn(10, 8, requires_grad=True)
    with saved_bytes() as saved:
        y = x.exp()  # saves its own output, 320 bytes
        z = y[:5] * y[:5]  # saves two views of that same storage
    assert saved.bytes == 320
    z.sum().backward()


def test_leaves_out_what_lives_anyway():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    x = torch.randn(3, 8, requires_grad=True)
    with saved_bytes() as saved:
        F.linear(x, weight)
    with saved_bytes(exclude=[weight, x]) as less:
        F.linear(x, weight)
    assert saved.bytes == weight.nbytes + x.nbytes
    assert less.bytes == 0


def test_temporary_tensors_do_not_share_an_address():
    x = torch.randn(6, requires_grad=True)
    with saved_bytes() as saved:
        for _ in range(5):
            (x * torch.randn(6)).sum()
    assert saved.bytes == 5 * 24 + x.nbytes * 0


def test_nothing_stays_of_what_was_counted():
    """That holds for a graph that has no backward and for an operation that saves its own output."""
    x = torch.ones(8, requires_grad=True)
    with saved_bytes([x]) as saved:
        x.exp().tanh().softmax(0)
    assert saved.bytes
    counted = weakref.ref(saved)
    del saved
    assert counted() is None
