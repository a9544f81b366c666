"""A product of two matrices into a third, for the drivers that cut one product into many (the vocabulary loss).

    out = left right            left (M, K) and right (K, N) of one dtype, out (M, N) of that dtype or of that of sums
    out += left right           with ``add``

Sums are fp32 (fp64 for fp64) and rounded once; where out has their dtype, not at all on CUDA, and to that of left on a
CPU with instructions for it. On a CPU without instructions for a 16-bit dtype, where PyTorch's products are many times
slower than those of fp32, the C++ kernels widen it block by block (``csrc/cpu/product.cpp``).

Saves: nothing. The product is a part of ops, not an op of its own, and has no gradient.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from petl_kernels.dispatch import active, dispatch, load_error, register

ALIGNED = 64  # words


def product_into(out: Tensor, left: Tensor, right: Tensor, add: bool = False) -> None:
    """Writes left (M, K) right (K, N) into out (M, N), or adds it there; the rows of out lie side by side."""
    dispatch("product", left.device, active(), left.dtype)(out, left, right, add)


@register("product", "reference")
def reference(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    if out.dtype != left.dtype and _writes_sums(left.device, left.dtype):
        if add:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif out.dtype != left.dtype:
        product = torch.mm(left, right)
        out.add_(product) if add else out.copy_(product)
    elif add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


@functools.cache
def _writes_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether the library's products of ``dtype`` write, and add to, the dtype of sums on this device."""
    if device.type != "cuda":
        return False
    left, total = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=total.dtype, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # another kind of card, or a PyTorch that refuses the dtypes
        return False
    return True


def aligned_parts(count: int) -> list[slice]:
    """Returns the words of a product in one or two parts: a multiple of ALIGNED, and the rest.

    A card takes three times as long for a product over an odd number of words, and hardly any time for the rest alone.
    """
    whole = count - count % ALIGNED
    return [part for part in (slice(0, whole), slice(whole, count)) if part.start < part.stop]


def widens(dtype: torch.dtype) -> bool:
    """Returns whether the C++ kernels widen products of ``dtype`` on this CPU, block by block."""
    return load_error("cpu") is None and torch.ops.petl_cpu.widens(dtype)


def product_bytes(rows: int, depth: int, columns: int, dtype: torch.dtype) -> int:
    """Returns the bytes of scratch that one product (rows, depth) (depth, columns) takes on the CPU: blocks in fp32."""
    return torch.ops.petl_cpu.product_bytes(rows, depth, columns) if widens(dtype) else 0
