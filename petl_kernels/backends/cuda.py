"""The CUDA C++ kernels (``csrc/cuda``)."""

from __future__ import annotations

try:
    import petl_kernels._C  # registers torch.ops.petl_cuda where it was built with CUDA
except ModuleNotFoundError as error:
    raise ImportError("the C++ extension was not built: reinstall with a C++ compiler on the PATH") from error
if petl_kernels._C.build_info()["cuda"] == "no":
    raise ImportError("the extension was built without CUDA")
