"""The extension: what it says about itself, CUDA sources on a machine without a GPU, a machine without a compiler."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from petl_kernels import dispatch

from . import contract

ROOT = Path(__file__).parents[2]
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a source tree")


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
def test_build_info():
    import petl_kernels._C

    info = petl_kernels._C.build_info()
    assert set(info) == {"compiler", "flags", "torch", "vectors", "cuda"}
    assert "-O3" in info["flags"] and re.match(r"(gcc|clang) \d+", info["compiler"])
    assert torch.__version__.startswith(info["torch"])


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
def test_constants_of_both_languages_are_equal():
    import petl_kernels._C

    for path, values in petl_kernels._C.constants().items():
        module, name = path.split(".")
        own = getattr(importlib.import_module(f"petl_kernels.ops.{module}"), name)
        own = torch.tensor(own, dtype=torch.float64).reshape(-1)
        assert own.float().tolist() == torch.tensor(values, dtype=torch.float64).float().tolist(), path


@needs_sources
@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
def test_the_extension_has_the_kernels_of_its_sources():
    """An extension that was built before a kernel was added or renamed would leave that op to the reference."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    assert sorted(re.findall(r"PETL_KERNEL\((\w+)\)", sources)) == sorted(dispatch.registered("cpu"))


@needs_sources
def test_without_a_compiler_the_build_goes_through():
    # setup.py decides when it is imported; what it would hand to setuptools is printed instead.
    program = "import setuptools; setuptools.setup = lambda **given: print(sorted(given)); import setup"
    environment = os.environ | {"CXX": "no-such-compiler"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "ext_modules" not in run.stdout
    assert run.stderr.count("no C++ compiler found") == 1


@pytest.mark.slow
@needs_sources
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_without_a_card_and_its_name_the_cuda_sources_are_compiled():
    """PyTorch ends in a traceback where it has a .cu file and no card to compile it for; there is none."""
    program = (
        "import setuptools, torch; setuptools.setup = lambda **_: None; import setup; torch.version.cuda = '13.0'; "
        "built = setup.extension(); print(*built.sources); print(*built.extra_compile_args)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "PETL_CUDA")
    }
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    files, flags = run.stdout.splitlines()[-2:]
    assert "csrc/cuda/bindings.cpp" in files and {Path(file).suffix for file in files.split()} == {".cpp"}
    assert flags == "cxx"


@pytest.mark.slow
@needs_sources
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_toolkit_is_where_the_headers_are(tmp_path):
    """An nvcc on the PATH that is a script for another one: PyTorch would look for headers beside the script."""
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    script.chmod(0o755)
    program = (
        f"import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.toolkit({str(tmp_path)!r}))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    home = Path(run.stdout.splitlines()[-1])
    assert home != tmp_path and (home / "include" / "cuda_runtime_api.h").exists() and (home / "bin" / "nvcc").exists()


@needs_sources
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_slot_ring_compiles_without_pytorch(tmp_path):
    source = ROOT / "csrc" / "host" / "slot_ring.cpp"
    command = ["nvcc", "-std=c++17", "-O3", "-Xcompiler", "-Wall,-Wextra,-Werror", "-DPETL_CUDA=1", "-c", source]
    run = subprocess.run([*command, "-o", tmp_path / "out.o"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = subprocess.run(["nm", "-C", tmp_path / "out.o"], capture_output=True, text=True).stdout
    assert "petl::SlotRing::fill" in names and "cudaMemcpyAsync" in names
