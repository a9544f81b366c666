"""csrc/cuda/products.cpp on a played cuBLASLt (played_cublaslt/): what it multiplies, and how it chooses a kernel."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from petl_kernels.ops.bits import pack_bits

ROOT = Path(__file__).parents[2]
PLAYED = Path(__file__).with_name("played_cublaslt")
pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="runs in a source tree"),
]
BF16, FP32 = torch.bfloat16, torch.float32
MOST = 32 << 20


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cublaslt")
    flags = ["c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-I{PLAYED}"]
    played, found = folder / "libcublasLt.so.0", folder / "products.so"
    subprocess.run([*flags, PLAYED / "played.cpp", "-o", played], check=True)
    sources = [PLAYED / "call.cpp", ROOT / "csrc/cuda/products.cpp"]
    linked = [f"-I{ROOT / 'csrc/cuda'}", *sources, played, f"-Wl,-rpath,{folder}", "-ldl", "-o", found]
    subprocess.run([*flags, *linked], check=True)
    return folder


@pytest.fixture
def card(built, tmp_path):
    """A library that has chosen nothing yet: a copy under another name is another one to the loader."""
    shutil.copytree(built, tmp_path / "own")
    played = ctypes.CDLL(str(built / "libcublasLt.so.0"))
    for name in ("captures", "heuristics", "run_count"):
        ctypes.c_int.in_dll(played, f"played_{name}").value = 0
    own = ctypes.CDLL(str(tmp_path / "own" / "products.so"))
    own.call.restype = ctypes.c_char_p
    return Card(played, own)


class Card:
    def __init__(self, played, own):
        self.played, self.own = played, own

    def value(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.played, f"played_{name}").value

    def capture(self, on: bool) -> None:
        ctypes.c_int.in_dll(self.played, "played_captures").value = on

    def runs(self) -> list[int]:
        """The kernels that were started since this was last called."""
        count = ctypes.c_int.in_dll(self.played, "played_run_count")
        found = list((ctypes.c_int * 64).in_dll(self.played, "played_runs"))[: count.value]
        count.value = 0
        return found

    def multiply(self, out, left, right, transposed=False, bias=None, bits=None, add=False, timed=True) -> int:
        """Returns the bytes of workspace."""
        sizes = (*out.shape, left.shape[1])
        workspace = ctypes.c_int64()

        def address(tensor):
            return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

        def stride(tensor):
            return ctypes.c_int64(0 if tensor is None else tensor.stride(0))

        wrong = self.own.call(
            int(out.dtype == FP32), *map(ctypes.c_int64, sizes), address(left), stride(left), address(right),
            stride(right), int(transposed), address(out), stride(out), ctypes.c_float(add), address(bias),
            address(bits), stride(bits), int(timed), ctypes.byref(workspace),
        )  # fmt: skip
        if wrong:
            raise RuntimeError(wrong.decode())
        return workspace.value


def whole(*shape: int, wide: int = 0, dtype=BF16) -> torch.Tensor:
    """Small whole numbers, whose products need no rounding; rows further apart than they are long with ``wide``."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randint(-2, 3, (*shape[:-1], shape[-1] + wide), generator=generator)
    return values.to(dtype)[..., : shape[-1]]


def expected(left, right, transposed, bias=None):
    product = left.float() @ (right.float().T if transposed else right.float())
    return product if bias is None else product + bias.float()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide", [0, 8])
def test_products_with_a_bias_and_without(card, transposed, wide):
    left, right = whole(5, 8, wide=wide), whole(24, 8, wide=wide) if transposed else whole(8, 24, wide=wide)
    for bias in (None, whole(24)):
        out = whole(5, 24, wide=wide)
        card.multiply(out, left, right, transposed, bias)
        assert torch.equal(out.float(), expected(left, right, transposed, bias))
    assert card.value("heuristics") == 2


def test_a_relu_s_bits_are_the_package_s_own(card):
    left, right, bias = whole(6, 16), whole(256, 16), whole(256)
    out, bits = torch.empty(6, 256, dtype=BF16), torch.full((6, 32), 0xAA, dtype=torch.uint8)
    z = expected(left, right, True, bias)
    card.multiply(out, left, right, True, bias, bits)
    assert torch.equal(out.float(), z.relu()) and torch.equal(bits, pack_bits(z > 0))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_what_is_added_to_is_added_to_once(card, dtype):
    """Kernels are timed over the very output: what is in it has to outlast that."""
    left, right, out = whole(5, 8), whole(8, 16), whole(5, 16, dtype=dtype)
    for _ in range(2):
        before = out.clone()
        card.multiply(out, left, right, add=True)
        assert torch.equal(out.float(), before.float() + expected(left, right, False))


def test_the_fastest_is_kept_with_its_workspace(card):
    """The third of 5, -, 3 and 4 is kept; the second cannot run. All have the same addresses."""
    left, right, out = whole(5, 8), whole(8, 16), torch.empty(5, 16, dtype=BF16)
    assert card.multiply(out, left, right) == MOST
    assert set(card.runs()) == {0, 1, 2, 3}
    left += 1
    assert card.multiply(out, left, right) == 200
    assert card.runs() == [2] and card.value("heuristics") == 1
    assert torch.equal(out.float(), expected(left, right, False))
    card.multiply(out[:4], left[:4], right)  # of another size
    assert card.value("heuristics") == 2


def test_a_call_s_own_bias_and_bits_are_used(card):
    """Both 256 bytes after the ones before, and so aligned as those are: one kernel serves."""
    left, right, biases, several = whole(16, 8), whole(128, 8), whole(2, 128), torch.zeros(2, 16, 16, dtype=torch.uint8)
    out = torch.empty(16, 128, dtype=BF16)
    for _ in range(2):
        for bias, bits in zip(biases, several, strict=True):
            card.multiply(out, left, right, True, bias, bits.fill_(0))
            z = expected(left, right, True, bias)
            assert torch.equal(out.float(), z.relu()) and torch.equal(bits, pack_bits(z > 0))
    assert card.value("heuristics") == 1


def test_nothing_is_timed_or_kept_in_a_capture(card):
    left, right, out = whole(5, 8), whole(8, 16), torch.empty(5, 16, dtype=BF16)
    card.capture(True)
    for _ in range(2):
        assert card.multiply(out, left, right) == MOST
    assert card.runs() == [0, 0]
    card.capture(False)
    card.multiply(out, left, right)
    card.runs()
    card.capture(True)
    assert card.multiply(out, left, right) == 200 and card.runs() == [2]


def test_the_first_choice_where_nothing_may_be_timed(card):
    left, right, out = whole(5, 8), whole(8, 16), torch.empty(5, 16, dtype=BF16)
    for _ in range(2):
        card.multiply(out, left, right, timed=False)
    assert card.runs() == [0, 0] and card.value("heuristics") == 1


def test_what_cublaslt_refuses_is_said_in_words(card):
    left, right, out = whole(3, 8), whole(24, 8), torch.empty(3, 24, dtype=BF16)
    with pytest.raises(RuntimeError, match="not supported"):
        card.multiply(out, left, right, True, whole(24), torch.zeros(3, 3, dtype=torch.uint8))  # 24 bits are no 128


def test_descriptors_do_not_pile_up(card):
    left, right, out = whole(5, 8), whole(8, 16), torch.empty(5, 16, dtype=BF16)
    card.multiply(out, left, right)
    before = card.value("alive")
    for _ in range(3):
        card.multiply(out, left, right)
    card.capture(True)
    card.multiply(out[:3], left[:3], right)
    assert card.value("alive") == before
