"""The CUDA C++ kernels (``csrc/cuda``)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from petl_kernels.backends import kernel_of, load_error, register
from petl_kernels.backends.nf4 import dynamic_map
from petl_kernels.backends.products import CuBLASLtProducts

try:
    import petl_kernels._C  # registers torch.ops.petl_cuda where it was built with CUDA
except ModuleNotFoundError as error:
    raise ImportError("the C++ extension was not built: reinstall with a C++ compiler on the PATH") from error
if petl_kernels._C.build_info()["cuda"] == "no":
    raise ImportError("the extension was built without CUDA")

register("frozen_linear_backward", "cuda")(torch.ops.petl_cuda.frozen_linear_backward.default)
register("quantise_int8", "cuda")(torch.ops.petl_cuda.quantise_int8.default)


@register("activation", "cuda")
def activation(z: Tensor, kind: str, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """A ReLU without dropout; the reference has the rest."""
    if kind == "relu" and dropout == 0:
        return torch.ops.petl_cuda.packed_relu(z)
    return kernel_of("activation", "reference")(z, kind, dropout, seed)


@register("activation_backward", "cuda")
def activation_backward(dy: Tensor, saved: Tensor, kind: str, dropout: float, seed: Tensor | None) -> Tensor:
    if kind == "relu" and dropout == 0:
        return torch.ops.petl_cuda.packed_relu_backward(dy, saved)
    return kernel_of("activation_backward", "reference")(dy, saved, kind, dropout, seed)


@register("quantise_nf4", "cuda")
def quantise_nf4(weight: Tensor) -> list[Tensor]:
    return torch.ops.petl_cuda.quantise_nf4(weight, dynamic_map(weight.device))


@register("dequantise", "cuda")
def dequantise(parts: list[Tensor], first_row: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.ops.petl_cuda.dequantise(parts, first_row, rows, columns, dtype, dynamic_map(parts[0].device))


def _register_network(name: str) -> None:
    from petl_kernels.backends.triton import frozen_ffn as network

    own = functools.partial(getattr(network, name), products=CuBLASLtProducts)

    @register(name, "cuda")
    def serve(first, *args):
        return (own if first.dtype.itemsize == 2 else kernel_of(name, "triton"))(first, *args)


# Where cuBLASLt's headers were there when it was built. What lies between its products is Triton's.
if hasattr(torch.ops.petl_cuda, "multiply") and load_error("triton") is None:
    for part in ("", "_backward"):
        _register_network(f"frozen_ffn{part}")
