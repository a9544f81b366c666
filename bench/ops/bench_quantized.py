"""Linears over int8 and NF4 weights beside the dense one (the limit) and bitsandbytes; conversions beside a copy."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import counts
from bench.run.check import error, outcome
from bench.run.measure import copies, measure, record, rotation
from bench.run.peers import installed, peer, require
from bench.run.work import Case, Work, differentiated, step
from bench.shapes import distinct, shape
from petl_kernels import ops
from petl_kernels.ops.quantized import dequantize

MATRICES = ("d x d", "ffn x d", "d x ffn")
# The largest relative error of a product with the quantized weight, normally distributed, against the dense one.
ROUNDING = {"int8": 0.02, "nf4": 0.12}


def size_of(name: str, matrix: str, device: str) -> tuple[int, int]:
    s = shape(name, device)
    return {"d x d": (s.d, s.d), "ffn x d": (s.ffn, s.d), "d x ffn": (s.d, s.ffn)}[matrix]


def inputs(n: int, k: int, dtype: torch.dtype, device: str, tokens: int):
    x = torch.randn(tokens, k, device=device, dtype=dtype, requires_grad=True)
    return x, torch.randn(n, k, device=device, dtype=dtype) / k**0.5


def ours(storage: str):
    def prepare(x, weight) -> Work:
        held = ops.quantize(weight, storage)
        return Work(lambda: F.linear(x, held), (x,))

    return prepare


def dense_of(storage: str, dtype: torch.dtype):
    """Returns the product with the values that the storage has of the weight."""

    def formula(x, weight):
        parts = ops.quantize(weight.to(dtype), storage).parts()
        n, k = weight.shape
        return F.linear(x, dequantize(parts, 0, n, k, torch.float32).to(x.dtype))

    return formula


def bitsandbytes(storage: str):
    """Its int8 product rounds x as well, row by row."""
    library = installed("bitsandbytes", "bitsandbytes")

    def prepare(x, weight) -> Work:
        n, k = weight.shape
        if storage == "nf4":
            module = library.nn.Linear4bit(k, n, bias=False, compute_dtype=x.dtype, quant_type="nf4")
            module.weight = library.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        else:
            module = library.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
            module.weight = library.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        module = module.to(x.device)
        return Work(lambda: module(x), (x,))

    return prepare


IMPLEMENTATIONS = ["limit", "ours", peer("bitsandbytes")]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("tokens", ["batch", "one token"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", distinct("d"))
def test_product(benchmark, name, matrix, dtype, tokens, storage, implementation, device):
    """Forward and dx; "limit" is the dense weight. One token is a step of generation."""
    require(
        name,
        device,
        implementation,
        small=dtype == "bfloat16" and tokens == "batch" and matrix == "d x d" and name != "t5",
    )
    if dtype == "float32" and (matrix != "d x d" or implementation == "bitsandbytes"):
        pytest.skip("fp32 for one matrix, without bitsandbytes")
    n, k = size_of(name, matrix, device)
    rows = shape(name, device).tokens if tokens == "batch" else 1
    kind = getattr(torch, dtype)
    case = Case("quantized_project", name, rows, dtype, device, f"{storage} {matrix}")
    make = functools.partial(inputs, n, k, kind, device)
    if implementation == "limit":
        prepare, formula = differentiated(lambda x, weight: F.linear(x, weight)), None
        counted = counts.frozen_linear(rows, n, k, kind.itemsize)
    else:
        prepare, formula = ours(storage), dense_of(storage, kind)
        counted = counts.quantized_project(rows, n, k, storage, kind.itemsize)
    if implementation == "bitsandbytes":
        prepare, formula = bitsandbytes(storage), None
        check_rounding(prepare, make(32), storage)
    measure(benchmark, case, implementation, prepare, make, counted, formula)


def check_rounding(prepare, given, storage: str) -> None:
    """Somebody else's storage, close to the dense weight: other roundings than ours are no error."""
    found = outcome(prepare(*given))
    for value, exact in zip(found, outcome(differentiated(lambda x, w: F.linear(x, w))(*given)), strict=True):
        assert error(value, exact) < 2 * ROUNDING[storage], (
            f"{storage}: {error(value, exact):.2e} from the dense product"
        )


@pytest.mark.parametrize("implementation", ["limit", "ours"])
@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("direction", ["quantize", "dequantize"])
@pytest.mark.parametrize("name", distinct("d"))
def test_conversion(benchmark, name, direction, storage, implementation, device):
    """bf16 to the storage or back; "limit" is a copy in bf16, which moves more bytes than either."""
    require(name, device, implementation)
    n, k = size_of(name, "ffn x d", device)

    def prepare(_, weight) -> Work:
        held = ops.quantize(weight, storage)
        parts = held.parts()
        assert error(dequantize(parts, 0, n, k, weight.dtype), weight) < ROUNDING[storage]
        out = torch.empty_like(weight)
        runs = {
            "limit": lambda: out.copy_(weight),
            "quantize": lambda: ops.quantize(weight, storage).parts()[0],
            "dequantize": lambda: dequantize(parts, 0, n, k, weight.dtype),
        }
        return Work(runs["limit" if implementation == "limit" else direction])

    runs = [step(prepare(*each)) for each in copies(lambda: inputs(n, k, torch.bfloat16, device, 1), device)]
    counted = counts.streams(2, n * k, 2) if implementation == "limit" else getattr(counts, direction)(n, k, storage, 2)
    record(benchmark, Case(direction, name, n, "bfloat16", device, storage), implementation, rotation(runs), counted)
