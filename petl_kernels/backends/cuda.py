"""The CUDA C++ kernels (``csrc/cuda``)."""

from __future__ import annotations

import functools

import torch

from petl_kernels.backends.products import CuBLASLtProducts
from petl_kernels.dispatch import kernel_of, load_error, register

try:
    import petl_kernels._C  # registers torch.ops.petl_cuda where it was built with CUDA
except ModuleNotFoundError as error:
    raise ImportError("the C++ extension was not built: reinstall with a C++ compiler on the PATH") from error
if petl_kernels._C.build_info()["cuda"] == "no":
    raise ImportError("the extension was built without CUDA")


def _register_network(name: str) -> None:
    from petl_kernels.backends.triton import frozen_ffn as network

    own = functools.partial(getattr(network, name), products=CuBLASLtProducts)

    @register(name, "cuda")
    def serve(first, *args):
        return (own if first.dtype.itemsize == 2 else kernel_of(name, "triton"))(first, *args)


# The op is there if cuBLASLt's header was, when the extension was built. The passes between its products are Triton's.
if hasattr(torch.ops.petl_cuda, "multiply") and load_error("triton") is None:
    for part in ("", "_backward"):
        _register_network(f"frozen_ffn{part}")
