from __future__ import annotations

import torch

from petl_kernels import ops
from petl_kernels.memory.work import linear_flops


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
