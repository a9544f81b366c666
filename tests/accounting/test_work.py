from __future__ import annotations

import torch

from petl_kernels import ops
from petl_kernels.accounting.work import linear_flops
from petl_kernels.planning import cost


def test_products_are_counted():
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7)
    assert linear_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert linear_flops(lambda: torch.addmm(c, a, b)) == 2 * 3 * 5 * 7
    assert linear_flops(lambda: [c.addmm_(a, b) for _ in range(2)]) == 4 * 3 * 5 * 7
    assert linear_flops(lambda: a + 1) == 0


def test_products_inside_the_kernels_are_counted():
    x, weight = torch.randn(6, 8), torch.randn(4, 8)
    a, b = torch.randn(2, 8), torch.randn(4, 2)
    flops = linear_flops(lambda: ops.lora_linear(x, weight, None, a, b, 1.0))
    assert flops == 2 * 6 * (4 * 8 + 2 * 8 + 4 * 2)


def test_the_rate_of_products_is_that_of_the_packages_own(monkeypatch):
    """PyTorch's own in bf16 are some 50 times slower on a CPU without instructions for them, and no layer has them."""
    made = []
    monkeypatch.setattr(cost, "product_into", lambda out, left, right: made.append(left.dtype))
    assert cost.measure_rates.__wrapped__(torch.device("cpu"), torch.bfloat16).measured
    assert set(made) == {torch.bfloat16}
