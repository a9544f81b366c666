"""Values of base tensors: copied, widened to be changed, and stored as they were."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.ops.quantized import QuantizedTensor, quantize_like


def wide_copy(weight: Tensor) -> Tensor:
    """Returns the values of ``weight`` in fp32 or wider, dense, to be changed in place."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize(wide)
    return weight.detach().to(wide, copy=True)


def stored_as(weight: Tensor, values: Tensor) -> tuple[Tensor, float | None]:
    """Returns ``values`` held as ``weight`` is, and the relative error of rounding them where that is quantized."""
    if isinstance(weight, QuantizedTensor):
        return quantize_like(weight, values)
    return values.to(weight.dtype), None


def host_copy(tensor: Tensor) -> Tensor:
    """Returns a copy in host memory, so that what is set aside takes no bytes on the device."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)
