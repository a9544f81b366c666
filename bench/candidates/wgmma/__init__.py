"""Products with wgmma and TMA in CUDA C++, their loads on a warp of their own: sm_90 only.

Triton waits for copies and products in the same warps on sm_90; here one thread copies and two warpgroups multiply
(product.h describes how). The rank part is seeded into the accumulator and scaled there in fp32, as in
the shipped kernel. One launch for the y of each linear, and one for the dx of a group, whose products follow each other
in the same accumulator. The adapters are cast (and A is stacked) ahead of it: TMA copies bytes, it does not convert.

nvcc builds product.cu for the card at first use, without PyTorch's headers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from bench.candidates.frame import pair, shipped
from petl_kernels.backends.triton import config

FOLDER = Path(__file__).parent
SOURCES = ("product.cu", "product.h", "descriptor.h", "hopper.h")
ROWS, WIDE, NARROW = 128, 256, 128  # of an output tile


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("rows", "columns", "stride")]


def runs_on(x: torch.Tensor) -> bool:
    """On sm_90 with nvcc, for 16-bit rows that begin at multiples of 16 bytes."""
    rows_fit = x.stride(-2) % 8 == 0 and x.data_ptr() % 16 == 0
    return config.key(x) == "sm90" and x.element_size() == 2 and rows_fit and shutil.which("nvcc") is not None


@functools.cache
def library() -> ctypes.CDLL:
    digest = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "petl_kernels"
    built = cache / f"wgmma-{digest}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder, built.name)
            build(made)
            made.replace(built)
    return loaded(built)


def build(target: Path) -> str:
    """Makes the shared library; returns what ptxas prints of each kernel."""
    command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-I", FOLDER]
    command += ["-shared", "-Xcompiler", "-fPIC", FOLDER / "product.cu", "-o", target]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stdout + run.stderr


def loaded(path: Path) -> ctypes.CDLL:
    """Returns the library in this file with the argument types of its function, which are those of product.cu."""
    opened = ctypes.CDLL(str(path))
    matrix, number, flag, address = ctypes.POINTER(Matrix), ctypes.c_int, ctypes.c_bool, ctypes.c_void_p
    function = opened.petl_wgmma_product
    function.restype = ctypes.c_char_p
    function.argtypes = [matrix, matrix, matrix, number, matrix, matrix, ctypes.c_float, address]
    function.argtypes += [flag, flag, number, number, address]
    return opened


def product(out, lefts, rights, rank_left, rank_right, scale: float, bias, by_rows: bool) -> None:
    """out = Σ_g left_g right_gᵀ + scale · rank_left rank_rightᵀ + bias.

    by_rows: the right ones are not transposed, and there is no bias.
    """
    for matrix in (out, *lefts, *rights, rank_left, rank_right):
        assert matrix.dtype == out.dtype and matrix.stride(1) == 1
        assert matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 8 == 0
    assert out.shape[1] % 8 == 0 and out.element_size() == 2
    assert bias is None or (bias.dtype == out.dtype and bias.data_ptr() % 4 == 0 and bias.stride(0) == 1)
    rows, columns = out.shape
    processors = config.processors(out.device)
    tiles = {width: -(-rows // ROWS) * -(-columns // width) for width in (WIDE, NARROW)}
    width = WIDE if tiles[WIDE] >= processors else NARROW
    error = library().petl_wgmma_product(
        _described(out), _described(*lefts), _described(*rights), len(lefts), _described(rank_left),
        _described(rank_right), scale, None if bias is None else bias.data_ptr(), by_rows, out.dtype == torch.bfloat16,
        width, min(processors, tiles[width]),
        torch.cuda.current_stream(out.device).cuda_stream if out.is_cuda else None,
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())


def _described(*matrices: torch.Tensor) -> ctypes.Array:
    return (Matrix * len(matrices))(*(Matrix(m.data_ptr(), *m.shape, m.stride(0)) for m in matrices))


def _outputs(ys, s, x, weights, biases, a, b, scales) -> None:
    shipped._project(s, x, a, 0.0, None)
    factors = s.split([m.shape[1] for m in b], 1)
    for y, weight, bias, factor, b_g, scale in zip(ys, weights, biases, factors, b, scales, strict=True):
        product(y, [x], [weight.contiguous()], factor, b_g.to(x.dtype), scale, bias, by_rows=False)


def _gradients(dx, da, db, dbias, dys, x, s, weights, a, b, scales) -> None:
    ds = shipped._rank_gradients(dys, b, scales, s)
    stacked = (a[0] if len(a) == 1 else torch.cat(a)).to(dx.dtype)
    product(dx, dys, [w.contiguous() for w in weights], ds, stacked, 1.0, None, by_rows=True)
    shipped._adapter_gradients(da, db, dbias, dys, x, s, ds, scales, 0.0, None)


_functions = pair(_outputs, _gradients)
lora_linear, lora_linear_backward = _functions.lora_linear, _functions.lora_linear_backward
