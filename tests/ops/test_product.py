"""The product of the drivers: every layout and dtype against float64, sums in fp32, and what it takes meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels.dispatch import load_error, use
from petl_kernels.ops import product
from petl_kernels.ops.define import accumulate_dtype

LAYOUTS = ("rows", "columns", "part")
# Odd sizes, one row, more than one block of rows, of columns and of the inner dimension, no inner dimension.
SIZES = ((1, 7, 5), (3, 300, 17), (259, 64, 33), (13, 513, 261), (7, 0, 9), (64, 64, 64))
BACKENDS = [name for name in ("reference", "cpu") if load_error(name) is None]


def laid_out(rows: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "columns":
        return torch.randn(columns, rows).to(dtype).T
    wide = columns + 3 if layout == "part" else columns
    return torch.randn(rows, wide).to(dtype)[:, :columns]


def largest_error(exact: torch.Tensor, terms: torch.Tensor, out: torch.dtype, dtype: torch.dtype, once: bool):
    """What each number may be off: a rounding to ``out``, and fp32 (or fp64) sums of numbers as large as ``terms``."""
    sums = 16 * torch.finfo(accumulate_dtype(dtype)).eps * terms
    return sums + (torch.finfo(out).eps / 2 * exact.abs() if once else 2 * torch.finfo(dtype).eps * terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_the_exact_one(size, dtype, backend):
    """Where the CPU kernels widen, rounded once; the library may round its sum and the addition."""
    m, k, n = size
    once = backend == "cpu" and product.widens(dtype) and m > 1
    for left_layout in LAYOUTS:
        for right_layout in LAYOUTS:
            left, right = laid_out(m, k, dtype, left_layout), laid_out(k, n, dtype, right_layout)
            before = torch.randn(m, n + 2).to(dtype)[:, :n]
            terms = left.double().abs() @ right.double().abs() + before.double().abs()
            for out, add in (
                (before.clone(), False),
                (before.clone(), True),
                (before.to(accumulate_dtype(dtype)), True),
            ):
                exact = left.double() @ right.double() + (before.double() if add else 0)
                with use(backend):
                    product.product_into(out, left, right, add)
                assert ((out.double() - exact).abs() <= largest_error(exact, terms, out.dtype, dtype, once)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_threads_change_no_bit(dtype):
    """Large enough for threads; an inner dimension of several steps."""
    left, right = torch.randn(70, 600).to(dtype), torch.randn(90, 600).to(dtype).T
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            product.product_into(out := torch.empty(70, 90, dtype=dtype), left, right)
            found.append(out)
    finally:
        torch.set_num_threads(threads)
    if product.widens(dtype):
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("size", [(5, 40, 9), (300, 600, 500), (16, 300, 700), (700, 300, 16)])
def test_the_blocks_are_counted(size):
    """As the allocator sees them: it rounds three blocks up, and a block below a page is not its memory at all.

    Nothing where products are not widened.
    """
    _C = pytest.importorskip("petl_kernels._C", reason="the extension was not built")
    m, k, n = size
    _C.install_cpu_allocator()
    left, right, out = (torch.zeros(*sizes, dtype=torch.bfloat16) for sizes in ((m, k), (n, k), (m, n)))
    before = _C.cpu_bytes()
    _C.reset_cpu_peak()
    product.product_into(out, left, right.T)
    measured = _C.cpu_peak() - before
    counted = product.product_bytes(m, k, n, torch.bfloat16)
    if product.widens(torch.bfloat16):
        assert abs(measured - counted) <= 3 * 4096 < counted
    else:
        assert counted == 0


def test_sums_in_their_own_dtype_are_the_library_s_where_it_has_them(monkeypatch):
    """A tensor without values shows which product is called, with which arguments; a CPU has none of these."""
    left, out = torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16)
    assert not product._writes_sums(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(NotImplementedError):
        torch.addmm(out, left, left, out_dtype=out.dtype, out=out)
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(product, "_writes_sums", lambda device, dtype: True)
    with Calls():
        for add in (False, True):
            product.reference(out.to("meta"), left.to("meta"), left.to("meta"), add)
    assert [name for name in called if "mm" in name] == ["aten::mm.dtype_out", "aten::addmm.dtype_out"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_their_own_dtype_on_a_card(dtype):
    left, right, out = (torch.randn(*size, device="cuda") for size in ((300, 520), (520, 136), (300, 136)))
    left, right, before = left.to(dtype), right.to(dtype), out.clone()
    assert product._writes_sums(out.device, dtype)
    for add in (False, True):
        product.product_into(out.copy_(before), left, right, add)
        exact = left.double() @ right.double() + (before.double() if add else 0)
        assert (out.double() - exact).abs().max() <= 1e-4
