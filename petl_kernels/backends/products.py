"""The library's products: PyTorch's calls, and cuBLASLt's where the extension has them (``csrc/cuda/products.cpp``).

Matrices lie row by row. cuBLASLt is asked for several kernels once a shape, and the fastest is kept: its first choice,
which PyTorch takes, is up to 15% slower. That differs from run to run, and rounding with it; where
``torch.use_deterministic_algorithms`` is on it is always the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PyTorchProducts:
    """Multiplies with PyTorch's own calls."""

    @staticmethod
    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """Writes rows (M, K) Wᵀ + bias into out (M, N), for W (N, K)."""
        if bias is None:
            return torch.mm(rows, weight.t(), out=out)
        return torch.addmm(bias, rows, weight.t(), out=out)

    @staticmethod
    def relu_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, bits: Tensor | None) -> bool:
        """Writes relu(rows Wᵀ + bias) into out (M, N); returns whether ``bits`` (M, N / 8) hold its positive places."""
        bias = rows.new_zeros(out.shape[1]) if bias is None else bias
        torch._addmm_activation(bias, rows, weight.t(), out=out)  # pyright: ignore[reportPrivateImportUsage]
        return False

    @staticmethod
    def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> Tensor:
        """Writes left (M, K) right (K, N) into out (M, N), or adds it; out has their dtype, or fp32."""
        if out.dtype != left.dtype:
            product = product_in_fp32(left, right)
            return out.add_(product) if add else out.copy_(product)
        return out.addmm_(left, right) if add else torch.mm(left, right, out=out)


class CuBLASLtProducts(PyTorchProducts):
    """Multiplies with cuBLASLt in 16 bits, where 8 divides sizes and strides, and with PyTorch's calls elsewhere."""

    @staticmethod
    def linear(rows, weight, bias, out):
        if not _fit(rows, weight, out):
            return PyTorchProducts.linear(rows, weight, bias, out)
        torch.ops.petl_cuda.multiply(out, rows, weight, True, bias, None, False)
        return out

    @staticmethod
    def relu_linear(rows, weight, bias, out, bits):
        # cuBLASLt's rows of bits are whole 16 bytes; ours have no gap.
        if bits is None or out.shape[1] % 128 or not _fit(rows, weight, out):
            return PyTorchProducts.relu_linear(rows, weight, bias, out, bits)
        bias = rows.new_zeros(out.shape[1]) if bias is None else bias
        torch.ops.petl_cuda.multiply(out, rows, weight, True, bias, bits, False)
        return True

    @staticmethod
    def multiply(left, right, out, add=False):
        if not _fit(left, right, out):
            return PyTorchProducts.multiply(left, right, out, add)
        torch.ops.petl_cuda.multiply(out, left, right, False, None, None, add)
        return out


def _fit(*matrices: Tensor) -> bool:
    left, right, out = matrices
    return (
        left.dtype == right.dtype
        and left.dtype in (torch.bfloat16, torch.float16)
        and out.dtype in (left.dtype, torch.float32)
        and all(map(_has_aligned_rows, matrices))
    )


def _has_aligned_rows(matrix: Tensor) -> bool:
    columns, stride = matrix.shape[1], matrix.stride(0)
    return matrix.numel() > 0 and matrix.stride(1) == 1 and columns % 8 == stride % 8 == 0 and stride >= columns


def product_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Returns left (M, K) right (K, N), both of one dtype, in fp32: the sums are not rounded."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    if left.is_cuda and torch.version.cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """Returns ``tensors`` in ``dtype``; on CUDA one launch casts all those of one other dtype."""
    others = [tensor for tensor in tensors if tensor is not None and tensor.dtype != dtype]
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in others]
    if cast:
        torch._foreach_copy_(cast, others)  # pyright: ignore[reportPrivateImportUsage]
    found = iter(cast)
    return [tensor if tensor is None or tensor.dtype == dtype else next(found) for tensor in tensors]
