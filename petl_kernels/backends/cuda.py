"""The CUDA C++ kernels (``csrc/cuda``)."""

from __future__ import annotations

import functools

import torch

from petl_kernels.backends.products import CuBLASLtProducts
from petl_kernels.dispatch import kernel_of, load_error, register
from petl_kernels.extension import load_extension

if load_extension().build_info()["cuda"] == "no":
    raise ImportError("the extension was built without CUDA")


def _register_network(name: str) -> None:
    from petl_kernels.backends.triton import frozen_ffn as network

    own = functools.partial(getattr(network, name), products=CuBLASLtProducts)

    @register(name, "cuda")
    def serve(first, *args):
        if first.dtype.itemsize == 2:
            return own(first, *args)
        kernel = kernel_of(name, "triton")
        assert kernel is not None, f"Triton has no {name}"
        return kernel(first, *args)


# The op is there if cuBLASLt's header was, when the extension was built. The passes between its products are Triton's.
if hasattr(torch.ops.petl_cuda, "multiply") and load_error("triton") is None:
    for part in ("", "_backward"):
        _register_network(f"frozen_ffn{part}")
