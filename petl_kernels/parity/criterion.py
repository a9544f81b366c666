"""The criterion that a kernel's values are held to.

Against the reference in float64, a kernel's error may be at most twice the error that the reference
itself makes in the dtype at hand, plus some units in the last place of the largest value m (2^-23 m in fp32):

    2           for values in 16 bits, whose own rounding outweighs all else, and for ops that add nothing up
    max(2, √n)  for values in fp32 and wider at the end of n additions
                (n is counted for each value by its axes; in attention a score of 15 counts as 15² more)

A kernel may add up in any order, and how far the reference is off depends on the order of a library. With u = 2^-24,
an addition rounds its result S by u|S| at most, evenly distributed. In no order are the partial sums of random terms,
such as the ones here, much larger than the largest of all results. So n additions make n errors of mean zero and of
variance u²m²/3 at most, together a standard deviation of u m √(n/3): √n units, 2u m each, are 3.5 of these.

LoRA as the Triton kernels add it, the part of the rank first and in order, misses two units for 25 of 60 draws of
inputs, and √n/3 for none. Inputs in TF32 are off by 70 times what is allowed at least, a sum without one of its terms
by 30,000 times (``tests/ops/test_parity.py``).

Source: N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41
(2019), A2815: √n u instead of the worst case's n u, where rounding errors are independent and of mean zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compare_tensors(name: str, computed: Tensor, reference: Tensor, exact: Tensor, additions: int = 0) -> str | None:
    """Returns None where ``computed`` meets the criterion, else how far it is off.

    ``reference``: the reference's value in the dtype at hand; ``exact``: in float64; ``additions``: behind one element.
    """
    if computed.shape != exact.shape or computed.dtype != reference.dtype:
        return (
            f"{name} is {computed.dtype} of shape {tuple(computed.shape)}, "
            f"expected {reference.dtype} of {tuple(exact.shape)}"
        )
    if exact.numel() == 0:
        return None
    units = 2 if computed.dtype.itemsize == 2 else max(2, math.sqrt(additions))
    error = (computed.double() - exact).abs().max().item()
    allowed = 2 * (reference.double() - exact).abs().max().item()
    allowed += units * torch.finfo(computed.dtype).eps * exact.abs().max().item()
    if not error <= allowed:  # also true for NaN
        return f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    return None
