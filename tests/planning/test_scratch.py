"""Bytes that ops take inside themselves on a card, beside what their Triton kernels' wrappers allocate there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from methods.models import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import petl_kernels as pk
from petl_kernels.layers import border
from petl_kernels.ops.lora_border import room
from petl_kernels.ops.quantized import CUDA_TILE_BYTES, quantize
from petl_kernels.planning import simulate
from petl_kernels.planning.scratch import ATTENTION, BLOCKS, QUANTIZED, scratch_bytes

BF16, FP32, MIB = torch.bfloat16, torch.float32, 1 << 20
PETL = torch.ops.petl
sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))


class Allocated(TorchDispatchMode):
    """Records the bytes of each new tensor of a wrapper on meta tensors."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            self.sizes.setdefault(storage._cdata, (storage, storage.nbytes()))  # kept, or its address is another's
        return result


def new(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def allocated(call, inputs, card: str = "sm90") -> int:
    """Returns the bytes of what ``call`` makes on ``card`` and does not return."""
    pytest.importorskip("triton")
    aot = importlib.import_module("triton_aot")
    results = []
    with Allocated() as made:
        aot.record(card, lambda: results.append(call()))
    known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((inputs, results)) if isinstance(leaf, torch.Tensor)}
    return sum(size for key, (_, size) in made.sizes.items() if key not in known)


def border_backward(tokens: int, rank: int, dtype=BF16, d: int = 1024) -> tuple:
    r = room(2 * rank)
    a, b = [new(rank, d, dtype=FP32), new(0, d, dtype=FP32)], [new(d, rank, dtype=FP32), new(d, 0, dtype=FP32)]
    a, b = [*a, a[0]], [*b, b[0]]
    tensors = new(tokens, 3 * d + r, dtype=dtype), new(tokens, d, dtype=dtype), new(tokens, 2 * rank, dtype=dtype)
    return *tensors, new(3 * d + r, d + r, dtype=dtype), a, b, [2.0] * 3, True, [True, False, False]


@pytest.mark.parametrize("rank", [16, 256])
@pytest.mark.parametrize(("tokens", "dtype"), [(100, BF16), (8192, BF16), (100_000, BF16), (100_000, FP32)])
def test_the_parts_of_a_border_s_gradients_are_bounded_and_counted(rank, tokens, dtype):
    given = border_backward(tokens, rank, dtype)
    from petl_kernels.backends.triton import lora_border

    found = allocated(lambda: lora_border.lora_border_backward(*given), given)
    counted = scratch_bytes(PETL.lora_border_backward.default, (*given, ""), "cuda")
    assert counted <= 64 * 4 * (2 * 1024 * rank + 3 * 1024) + 4 * 3 * 1024
    parts_of_a = found if tokens < 128 else 20 * 4 * 2 * 1024 * rank  # made when those of dB have gone
    assert found - parts_of_a <= counted <= 4 * found + MIB


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_a_quantized_feed_forward_network_has_its_hidden_values_once_and_counts_its_tiles(storage):
    """Its 8,192 rows have 64 MiB of hidden values; a tile of each weight is made after the other."""
    from petl_kernels.backends.triton import frozen_ffn

    tokens, d, f = 8192, 1024, 4096
    x = new(tokens, d)
    w1, w2 = (quantize(new(*shape), storage).parts() for shape in ((f, d), (d, f)))
    given = x, w1, None, w2, None, [], "relu", "bits"
    counted = scratch_bytes(PETL.frozen_ffn.default, (*given, ""), "cuda")
    plain = x, [new(f, d)], None, [new(d, f)], None, [], "relu", "bits", ""
    dense = scratch_bytes(PETL.frozen_ffn.default, plain, "cuda")
    found = allocated(lambda: frozen_ffn.frozen_ffn(*given), given)
    assert counted == dense + 2 * f * d
    assert 0 <= found - 64 * MIB - 2 * 2 * f * d < 4096  # a tile at a time, and nf4's table
    assert found - 2 * f * d <= counted + 4096


def test_a_quantized_lora_linear_counts_its_tile_and_what_is_added_to_dx():
    from petl_kernels.backends.triton import lora_linear

    tokens, n, d = 8192, 8192, 2048
    x, parts = new(tokens, d), quantize(new(n, d), "int8").parts()
    a, b, s = new(16, d, dtype=FP32), new(n, 16, dtype=FP32), new(tokens, 16)
    own = [a], [b], [2.0], 0.0, None
    counted = scratch_bytes(PETL.lora_linear.default, (x, parts, [None], *own, ""), "cuda")
    found = allocated(lambda: lora_linear.lora_linear(x, parts, [None], *own), (x, parts, own))
    assert n * d * 2 == CUDA_TILE_BYTES <= found <= counted + MIB
    dys = [new(tokens, n)]
    own = *own, True, [False]
    counted = scratch_bytes(PETL.lora_linear_backward.default, (dys, x, s, parts, *own, ""), "cuda")
    found = allocated(lambda: lora_linear.lora_linear_backward(dys, x, s, parts, *own), (dys, x, s, parts, own))
    assert x.nbytes + CUDA_TILE_BYTES <= found <= counted + 8 * MIB  # and parts of sums


def test_a_simulated_step_has_the_borders_of_a_card(monkeypatch):
    """Rows of k's and v's input are copied, and s and ds stand behind rows, as in a step with borders on the CPU."""
    with torch.device("meta"):
        model = pk.adapt(build("m2m100"), pk.LoRA(rank=8))
    batch, found = simulate.Batch(4, 16, 16), {}
    with simulate.fake_mode():
        for device in ("cpu", "cuda"):
            like = simulate.shallow(model, 1, 1)
            simulate.set_tiers(like, [2] * 2, device)
            found[device] = simulate.step(like, batch, device=device)
        monkeypatch.setattr(border, "DEVICES", {"cpu"})
        like = simulate.shallow(model, 1, 1)
        simulate.set_tiers(like, [2] * 2)
        forced = simulate.step(like, batch, device="cuda")
    assert found["cuda"] == forced != found["cpu"]


@pytest.mark.parametrize(
    ("file", "constants"), [("attention.cpp", ATTENTION), ("common.h", BLOCKS), ("quantized.cpp", QUANTIZED)]
)
def test_the_kernels_cut_their_work_as_it_is_counted(file, constants):
    source = Path(__file__).parents[2] / "csrc" / "cpu" / file
    if not source.exists():
        pytest.skip("runs in a source tree")
    text = source.read_text(encoding="utf-8")
    for name, value in constants.items():
        found = re.search(rf"constexpr int64_t [^;]*\b{name} = ([\d <]+)", text)
        assert found and eval(found[1]) == value, name


def test_a_sum_in_a_wider_dtype_is_of_a_copy_on_a_cpu():
    function, x = torch.ops.aten.sum.dim_IntList, torch.zeros(300, 64, dtype=BF16)
    assert scratch_bytes(function, (x, [0]), "cpu", {"dtype": FP32}) == 4 * x.numel()
    assert not any(scratch_bytes(function, (x, [0]), *rest) for rest in (("cuda", {"dtype": FP32}), ("cpu", None)))
