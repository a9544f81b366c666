"""Products with int8 and NF4 weights in Triton: on a CUDA device, else in the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from petl_kernels import dispatch, parity
from petl_kernels.ops.quantized import reference_dequantize, reference_quantize_int8, reference_quantize_nf4

pytestmark = pytest.mark.skipif(dispatch.load_error("triton") is not None, reason="Triton cannot run here")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = {"int8": reference_quantize_int8, "nf4": reference_quantize_nf4}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if DEVICE.type == "cuda":
    DTYPES["bf16"] = torch.bfloat16
STORAGES = ("int8", "nf4")
# (N, K). 64 divides K: up to 4 rows one by one, more with Ŵ dequantized in the main loop, with one part of the sum or
# several. Otherwise ahead of the product, in one tile or several.
SHAPES = [(66, 64), (40, 320), (64, 96), (33, 130), (35, 192), (1, 2), (7, 1)]


# Rows of more tiles than one, of which the interpreter has smaller ones.
MANY = 129 if DEVICE.type == "cuda" else 33


def weight_of(n: int, k: int, storage: str, seed: int = 0) -> list[torch.Tensor]:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5
    values[n // 2] = 0
    return REFERENCE[storage](values)


def on_device(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [part.to(DEVICE) for part in parts]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(op: str, *arguments) -> torch.Tensor:
    return dispatch.kernel_of(op, "triton")(*arguments).cpu()


def held(name: str, computed: torch.Tensor, rows: torch.Tensor, dense, bias=None) -> None:
    """dense: the weight in rows' dtype, (in, out)."""
    plain = rows @ dense.to(rows.dtype)
    exact = rows.double() @ dense.double()
    if bias is not None:
        plain, exact = plain + bias, exact + bias.double()
    assert parity.compare_tensors(name, computed, plain, exact) is None


def products() -> Iterator:
    """Each shape in each storage with one row and with many, of which one in fp32 and one in fp16; the rest repeats."""
    for (i, shape), (j, storage), dtype, rows in itertools.product(
        enumerate(SHAPES), enumerate(STORAGES), DTYPES, (1, 3, 17, MANY)
    ):
        first = rows in (1, MANY) and (dtype == "bf16" or (dtype == "fp16") == ((i + j + (rows == 1)) % 2 == 0))
        identity = f"{shape[0]}x{shape[1]}-{storage}-{rows}-{dtype}"
        yield pytest.param(shape, storage, rows, dtype, marks=() if first else pytest.mark.repeat, id=identity)


@pytest.mark.parametrize(("shape", "storage", "rows", "dtype"), products())
def test_products(shape, storage, rows, dtype):
    n, k = shape
    if storage == "nf4" and n * k % 2:
        pytest.skip("a lone row or column of NF4 has an even number of values")
    parts, dtype = weight_of(n, k, storage), DTYPES[dtype]
    dense = reference_dequantize(parts, 0, n, k, torch.float32)
    x, dy, bias = (draw(i, *size).to(dtype) for i, size in enumerate(((rows, k), (rows, n), (n,))))
    parts = on_device(parts)
    held("y", run("quantized_project", x.to(DEVICE), parts, bias.to(DEVICE)), x, dense.T, bias)
    held("y", run("quantized_project", x.to(DEVICE), parts, None), x, dense.T)
    held("dx", run("quantized_project_back", dy.to(DEVICE), parts), dy, dense)


@pytest.mark.parametrize("storage", STORAGES)
def test_many_rows_take_tiles_dequantized_ahead(storage):
    parts = weight_of(96, 128, storage)
    dense = reference_dequantize(parts, 0, 96, 128, torch.float32)
    x, dy = draw(1, 513, 128).half(), draw(2, 513, 96).half()
    held("y", run("quantized_project", x.to(DEVICE), on_device(parts), None), x, dense.T)
    held("dx", run("quantized_project_back", dy.to(DEVICE), on_device(parts)), dy, dense)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_alone_of_more_than_a_block(storage):
    """A sum that ends within a second step, forward; rows of Ŵ that end within one, back; and rows further apart."""
    parts = weight_of(260, 64, storage)
    dense = reference_dequantize(parts, 0, 260, 64, torch.float32)
    dy = draw(1, 2, 300)[:, :260]
    held("dx", run("quantized_project_back", dy.to(DEVICE), on_device(parts)), dy, dense)
    parts = weight_of(3, 4160, storage)
    dense = reference_dequantize(parts, 0, 3, 4160, torch.float32)
    x, bias = draw(2, 2, 4200)[:, :4160], draw(3, 3)
    held("y", run("quantized_project", x.to(DEVICE), on_device(parts), bias.to(DEVICE)), x, dense.T, bias)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k", [128, 90])
def test_no_rows(storage, k):
    parts = on_device(weight_of(10, k, storage))
    assert run("quantized_project", torch.empty(0, k, device=DEVICE), parts, None).shape == (0, 10)
    assert run("quantized_project_back", torch.empty(0, 10, device=DEVICE), parts).shape == (0, k)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k", [320, 90])
def test_two_runs_agree_bitwise(storage, k):
    parts = on_device(weight_of(40, k, storage))
    x, dy = draw(1, 17, k).half().to(DEVICE), draw(2, 17, 40).half().to(DEVICE)
    assert torch.equal(run("quantized_project", x, parts, None), run("quantized_project", x, parts, None))
    assert torch.equal(run("quantized_project_back", dy, parts), run("quantized_project_back", dy, parts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k", [320, 75, 64])
def test_dequantized_rows(k, storage, dtype):
    """To a unit in the last place: the compiler may fuse an absmax's product and sum."""
    parts, dtype = weight_of(21, k, storage), DTYPES[dtype]
    for first, rows in ((0, 21), (5, 9), (20, 1), (3, 0)):
        found = run("dequantize", on_device(parts), first, rows, k, dtype)
        expected = reference_dequantize(parts, first, rows, k, dtype)
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)
