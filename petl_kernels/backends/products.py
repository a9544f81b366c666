"""Products of the library that PyTorch has in another form on each kind of device."""

from __future__ import annotations

import torch
from torch import Tensor


def product_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) right (K, N) of one dtype, with the fp32 sums as they are."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    if left.is_cuda and torch.version.cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """``tensors`` in ``dtype``: on CUDA one launch casts all that have another one, where they share it."""
    others = [tensor for tensor in tensors if tensor is not None and tensor.dtype != dtype]
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in others]
    if cast:
        torch._foreach_copy_(cast, others)
    found = iter(cast)
    return [tensor if tensor is None or tensor.dtype == dtype else next(found) for tensor in tensors]
