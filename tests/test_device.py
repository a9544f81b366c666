from __future__ import annotations

import pytest
import torch

from petl_kernels.device import resolve


@pytest.mark.parametrize(
    ("card", "given", "expected"),
    [
        (False, None, "cpu"),
        (False, "cuda", "cuda"),
        (False, "cuda:1", "cuda:1"),
        (True, None, "cuda:2"),
        (True, "cuda", "cuda:2"),
        (True, torch.device("cuda"), "cuda:2"),
        (True, "cuda:0", "cuda:0"),
        (True, "cpu", "cpu"),
        (True, "meta", "meta"),
    ],
)
def test_cuda_gets_the_number_of_the_current_device(monkeypatch, card, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert resolve(given) == torch.device(expected)
