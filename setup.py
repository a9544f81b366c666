"""Builds the extension petl_kernels._C. Everything else about the package is in pyproject.toml.

C++ always, unless there is no compiler: then the package is installed without the extension and runs on its
reference and Triton backends. CUDA where nvcc and a PyTorch with CUDA are there, for the architectures of
TORCH_CUDA_ARCH_LIST; PETL_CUDA=0 leaves it out.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

FLAGS = ["-O3", "-g0", "-fopenmp", "-Wall", "-Wno-unknown-pragmas"]
if platform.machine() in ("x86_64", "AMD64"):
    # Every x86 processor of the last ten years; backends/cpu.py checks before it loads the extension.
    FLAGS += ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]


def compiler() -> str | None:
    command = shlex.split(os.environ.get("CXX", "c++"))
    return shutil.which(command[0])


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.c*"))


def extension():
    import torch
    from torch.utils import cpp_extension

    files = ["csrc/ops.cpp", *sources("cpu", "host")]
    flags = [*FLAGS, f'-DPETL_FLAGS="{" ".join(FLAGS)}"']
    nvcc = cpp_extension.CUDA_HOME and Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists()
    if not (torch.version.cuda and nvcc) or os.environ.get("PETL_CUDA") == "0":
        return cpp_extension.CppExtension(
            "petl_kernels._C", files, extra_compile_args={"cxx": flags}, extra_link_args=["-fopenmp"]
        )
    flags.append(f"-DPETL_CUDA={torch.version.cuda}")
    return cpp_extension.CUDAExtension(
        "petl_kernels._C",
        [*files, *sources("cuda")],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
        extra_link_args=["-fopenmp"],
    )


def build_arguments() -> dict:
    if compiler() is None:
        print(
            "petl-kernels: no C++ compiler found; installing without the extension (plain PyTorch serves)",
            file=sys.stderr,
        )
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [extension()], "cmdclass": {"build_ext": BuildExtension}}


setup(
    package_dir={"petl_mt": "python/petl_mt"},
    package_data={"petl_mt": ["demo/**/*"]},
    **build_arguments(),
)
