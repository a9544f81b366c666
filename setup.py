"""Builds the extension petl_kernels._C. Everything else about the package is in pyproject.toml.

C++ always, unless there is no compiler: then the package is installed without the extension and runs on its
reference and Triton backends. csrc/cuda, too, where a PyTorch with CUDA and a toolkit (nvcc, with its headers) are
there; PETL_CUDA=0 leaves it out. These files are C++ that calls CUDA's libraries, so no card has to be named
(TORCH_CUDA_ARCH_LIST has no effect) and nvcc compiles none of them: it says where the toolkit lies.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
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
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.cpp"))


def toolkit(found: str | None) -> str | None:
    """Returns the folder with nvcc and CUDA's headers: PyTorch's choice ``found``, or the one that nvcc names; or None.

    PyTorch takes the folder above the nvcc on the PATH, which may be a script or a link beside other programs.
    """
    nvcc = shutil.which("nvcc", path=Path(found, "bin")) if found else shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    own = re.search(r"_HERE_=(.+)", told)
    homes = [Path(nvcc).parents[1], *([Path(own[1].strip()).parent] if own else []), Path("/usr/local/cuda")]
    for home in homes:
        if Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime_api.h").exists():
            return str(home)
    print(f"petl-kernels: {nvcc} has no cuda_runtime_api.h; building without csrc/cuda", file=sys.stderr)
    return None


def cublaslt(home: str) -> list[str] | None:
    """Returns the folders to search for cublasLt.h beside the toolkit's: none, or that of the package nvidia-cublas.

    None where there is no such header.
    """
    if Path(home, "include", "cublasLt.h").exists():
        return []
    folders = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include"))
    return next(([str(folder)] for folder in folders if (folder / "cublasLt.h").exists()), None)


def extension():
    import torch
    from torch.utils import cpp_extension

    files = ["csrc/ops.cpp", *sources("cpu", "host")]
    flags = [*FLAGS, f'-DPETL_FLAGS="{" ".join(FLAGS)}"']
    wanted = torch.version.cuda and os.environ.get("PETL_CUDA") != "0"
    home = toolkit(cpp_extension.CUDA_HOME) if wanted else None
    if home is None:
        return cpp_extension.CppExtension(
            "petl_kernels._C", files, extra_compile_args={"cxx": flags}, extra_link_args=["-fopenmp"]
        )
    cpp_extension.CUDA_HOME = home
    flags.append(f"-DPETL_CUDA={torch.version.cuda}")
    cuda, folders = sources("cuda"), cublaslt(home)
    if folders is None:
        print("petl-kernels: no cublasLt.h; PyTorch's own products serve", file=sys.stderr)
        cuda.remove("csrc/cuda/products.cpp")
    else:
        flags.append("-DPETL_CUBLASLT")
    return cpp_extension.CUDAExtension(
        "petl_kernels._C",
        [*files, *cuda],
        include_dirs=folders or [],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp", "-ldl"],
    )


def build_arguments() -> dict:
    if compiler() is None:
        print(
            "petl-kernels: no C++ compiler found; installing without the extension (plain PyTorch serves)",
            file=sys.stderr,
        )
        return {}
    # Without ninja, which is beside this Python, PyTorch compiles one file after the other.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [extension()], "cmdclass": {"build_ext": BuildExtension}}


setup(
    package_dir={"petl_mt": "python/petl_mt"},
    package_data={"petl_kernels": ["py.typed"], "petl_mt": ["py.typed", "demo/**/*", "fits/models/*.json"]},
    **build_arguments(),
)
