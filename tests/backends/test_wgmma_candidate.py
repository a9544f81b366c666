"""The wgmma candidate without a card: its very kernel source on emulated barriers, TMA and wgmma, and nvcc's output.

The emulation (wgmma_emulation/hopper.h) stands in for the one header that names instructions. That it notices what is
easy to get wrong is tested too, by breaking the kernel in those places.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from petl_kernels import parity

pytest.importorskip("triton")
HERE = Path(__file__).parent
from bench.candidates import wgmma  # noqa: E402

emulated = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="the emulation needs g++ and Linux' ucontext"
)

pytestmark = pytest.mark.repeat  # nothing that is installed calls a candidate
SCHEDULES = {"late": 0, "early": 1, "random": 2}  # wgmma_emulation/hopper.h says what they are
# rows, columns, K of each term, rank: one tile; tiles for two rounds of two blocks with a slot of rank and a part of
# one; three terms that fill the ring more than once. K and ranks end within a slot and within an instruction.
SHAPES = {
    "one tile": (33, 40, [72], 8),
    "several tiles": (129, 264, [200], 72),
    "three terms": (130, 136, [328, 64, 8], 16),
}


TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3}


def emulated_library(folder: Path, optimise: str, *changes: tuple[str, str]) -> wgmma.ctypes.CDLL:
    """The candidate's library on the emulation, with texts of its source exchanged; each has to be there once."""
    text = {name: (wgmma.FOLDER / name).read_text() for name in ("product.cu", "product.h", "descriptor.h")}
    for old, new in changes:
        assert sum(source.count(old) for source in text.values()) == 1, old
        text = {name: source.replace(old, new) for name, source in text.items()}
    for name, source in text.items():
        (folder / name).write_text(source)
    command = ["g++", "-std=c++17", optimise, "-shared", "-fPIC", "-I", HERE / "wgmma_emulation"]
    command += ["-x", "c++", folder / "product.cu", "-o", folder / "emulated.so"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return wgmma.loaded(folder / "emulated.so")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> wgmma.ctypes.CDLL:
    return emulated_library(tmp_path_factory.mktemp("emulation"), "-O1")


def use(monkeypatch, library, schedule: int, width: int | None = None) -> None:
    library.petl_emulation_schedule(schedule)
    monkeypatch.setattr(wgmma, "library", lambda: library)
    monkeypatch.setattr(wgmma.config, "processors", lambda device: 2)
    if width is not None:
        monkeypatch.setattr(wgmma, "WIDE", width)


def error_of(shape, dtype: torch.dtype, by_rows: bool, bias: bool) -> float:
    """Runs a product; its distance from float64, relative. Infinity where it wrote beyond its rows or columns."""
    rows, columns, depths, rank = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def right(depth: int) -> torch.Tensor:
        return draw(depth, columns) if by_rows else draw(columns, depth)

    lefts, rights = [draw(rows, k + 8)[:, 8:] for k in depths], [right(k) for k in depths]  # rows of larger matrices
    rank_left, rank_right, c = draw(rows, rank), right(rank), draw(columns) if bias else None
    around = torch.full((rows + 2, columns + 16), torch.nan, dtype=dtype)
    out = around[1:-1, 8:-8]
    wgmma.product(out, lefts, rights, rank_left, rank_right, 1.7, c, by_rows)

    exact = torch.zeros(rows, columns, dtype=torch.float64)
    for left, m, scale in [*zip(lefts, rights, [1.0] * len(lefts), strict=True), (rank_left, rank_right, 1.7)]:
        exact += scale * left.double() @ (m.double() if by_rows else m.double().T)
    exact += c.double() if bias else 0
    if int(around.isnan().sum()) != around.numel() - out.numel():
        return float("inf")
    return float((out.double() - exact).norm() / exact.norm())


@emulated
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("by_rows", [False, True], ids=["y", "dx"])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(emulation, monkeypatch, shape, by_rows, schedule):
    number = SCHEDULES[schedule]
    for dtype, width, bias in ((torch.float16, 128, number % 2 == 0), (torch.bfloat16, 256, number % 2 == 1)):
        use(monkeypatch, emulation, number, width)
        # One rounding of the result: at most half a unit of the last of 11 and 8 bits.
        assert error_of(SHAPES[shape], dtype, by_rows, bias and not by_rows) < TOLERANCE[dtype]


@emulated
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="its other launches are Triton's")
@pytest.mark.parametrize("case", ["one linear", "three linears"])
def test_values_and_gradients(emulation, monkeypatch, case):
    from bench.candidates import contest

    more = {} if case == "one linear" else dict(rows=(2, 17), ns=(40, 32, 8), ranks=(8, 8, 16), bias=False)
    shapes = dict(rows=(33,), ns=(40,), k=72, ranks=(8,), adapter_dtype=torch.float32) | more
    given = parity.lora_linear_arguments(parity.Source(torch.device("cpu"), torch.float16), **shapes)
    assert contest.functions("wgmma", given) is None  # not on a CPU, but for this test
    use(monkeypatch, emulation, SCHEDULES["random"])
    monkeypatch.setattr(wgmma, "runs_on", lambda x: True)
    assert contest.difference("wgmma", given) is None


BROKEN = {
    "descriptor's distances exchanged": ("address, kChunkBytes, kAtomBytes", "address, kAtomBytes, kChunkBytes"),
    "bytes of the left tile not announced": ("full, Shared<kWidth>::kSlotBytes)", "full, Shared<kWidth>::kRightBytes)"),
    "parity of an empty slot": ("cursor.parity ^ 1", "cursor.parity"),
    "slot released before its products end": ("products_wait<1>(sums)", "products_wait<2>(sums)"),
    "output not shown to the copy engine": ("    hopper::writes_publish();\n", ""),
    "output written over while it is copied": ("hopper::stores_wait_until_read<1>();", ""),
}


@emulated
@pytest.mark.parametrize(
    "fault", [next(iter(BROKEN)), *(pytest.param(name, marks=pytest.mark.repeat) for name in list(BROKEN)[1:])]
)
def test_the_emulation_notices(tmp_path, monkeypatch, fault):
    library = emulated_library(tmp_path, "-O0", BROKEN[fault])
    assert any(is_refused_or_wrong(monkeypatch, library, schedule) for schedule in SCHEDULES.values())


def is_refused_or_wrong(monkeypatch, library, schedule: int) -> bool:
    use(monkeypatch, library, schedule, 256)
    try:
        return not error_of(SHAPES["three terms"], torch.float16, by_rows=True, bias=False) < TOLERANCE[torch.float16]
    except RuntimeError:
        return True


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_compiled_kernels(tmp_path):
    import triton_aot

    image = tmp_path / "product.so"
    report = wgmma.build(image)
    wgmma.loaded(image)
    # ptxas tells with numbers C75.. what it did to wgmma and setmaxnreg: products one by one, fences put in, no change.
    assert "C75" not in report, report
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)) == {"0"}, report
    # 384 threads of 168 are what the three warpgroups have after they have divided them: 40 and twice 232.
    assert re.findall(r"Used (\d+) registers", report) == ["168"] * 8, report

    listing = subprocess.run([triton_aot.CUOBJDUMP, "-sass", image], capture_output=True, text=True, check=True).stdout
    kernels = listing.split("Function : ")[1:]
    assert len(kernels) == 8
    for kernel in kernels:
        name = kernel.splitlines()[0]
        width, by_rows = re.search(r"Li(\d+)ELb(\d)", name).groups()
        products = re.findall(r"HGMMA\S* .*", kernel)
        assert len(products) == 5, name  # one in the seed's loop, a slot's four in the main one
        assert all(f"64x{width}x16.F32" in line and ("tnspB" in line) == (by_rows == "1") for line in products), name
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in kernel, name  # a slot's products under way while the next is awaited
        for instruction in ("UTMALDG.2D", "USETMAXREG", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "STSM", "UTMASTG.2D"):
            assert instruction in kernel, (name, instruction)
        assert "LDL" not in kernel and "STL" not in kernel, name
