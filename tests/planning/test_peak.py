from __future__ import annotations

import torch

from .peaks import peak_bytes


def test_peak_is_the_most_that_lived_at_once():
    def work():
        for _ in range(4):
            x = torch.ones(1000)
            y = x + 1
            del x, y

    assert peak_bytes(work, []) == 8000


def test_living_tensors_count_once():
    w = torch.ones(500)
    assert peak_bytes(lambda: w.view(5, 100) + 1, [w, w]) == 4000


def test_backward_is_seen():
    w = torch.ones(100, 100, requires_grad=True)

    def work():
        (w @ w).sum().backward()

    # w, the product, and then at most: gradient of the product expanded, two partial gradients, their sum.
    assert 3 * w.nbytes <= peak_bytes(work, [w]) <= 5 * w.nbytes + 100
