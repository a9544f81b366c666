"""Linears in one product, with their adapters in a border of the weights, beside the linears one by one."""

from __future__ import annotations

import importlib

import pytest
import torch

from petl_kernels import parity
from petl_kernels.ops.define import below_autograd, run
from petl_kernels.ops.room import copied_rows, roomy, whole_rows

from . import contract

op = importlib.import_module("petl_kernels.ops.lora_border")
FP64 = torch.float64


def arguments(dtype=FP64, seed=0, **options) -> dict:
    return parity.lora_border_arguments(contract.source(dtype, seed), **options)


def plain(given: dict) -> dict:
    """The same by autograd, from the linears one by one."""
    leaves = {"x": given["x"], **{f"a{i}": a for i, a in enumerate(given["a"])}}
    leaves |= {f"b{i}": b for i, b in enumerate(given["b"])}
    leaves |= {f"bias{i}": c for i, c in enumerate(given["biases"]) if c.numel()}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    x, ys = leaves["x"], []
    for i, (w, scale) in enumerate(zip(given["weights"], given["scales"], strict=True)):
        ys.append(x @ w.T + scale * (x @ leaves[f"a{i}"].T) @ leaves[f"b{i}"].T)
        if f"bias{i}" in leaves:
            ys[i] = ys[i] + leaves[f"bias{i}"]
    y = torch.cat(ys, 1)
    grads = torch.autograd.grad(y, list(leaves.values()), torch.cat(given["dys"], 1))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("ranks", [(4, 0, 9), (8, 8), (0, 0), (3,)])
@pytest.mark.parametrize("more", [0, 16])
def test_equals_the_linears_one_by_one(ranks, more):
    """Also in a border that has more room than these adapters take. What is not set before is not a number."""
    given = arguments(ranks=ranks, ns=(40, 24, 33)[: len(ranks)], more=more)
    found = parity.run("lora_border", "reference", given)
    for name, value in plain(given).items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_nothing_of_an_earlier_call_stays():
    """Other adapters of other ranks have been in the border, and not a number is behind the rows."""
    first, second = (arguments(ranks=ranks, ns=(40, 24), more=more) for ranks, more in (((9, 7), 0), ((2, 0), 8)))
    expected = plain(second)
    second["border"] = first["border"]
    parity.run("lora_border", "reference", first)
    k = second["x"].shape[1]
    second["border"][:64, :k] = torch.cat(second["weights"])
    found = parity.run("lora_border", "reference", second)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11)


def test_the_fake_kernel_and_the_mutations_are_those_of_the_schema():
    given = arguments(torch.float32, ranks=(4, 0), ns=(16, 8))
    r = op.room(4)
    wide = copied_rows([given["x"]], r)
    border = given["border"][: 24 + r, : given["x"].shape[1] + r].nan_to_num()
    own = given["biases"], given["a"], given["b"], given["scales"]
    bias = torch.zeros(24)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.petl.lora_border.default, (wide, border, bias, *own, ""), test_utils=tests)
    _, s = torch.ops.petl.lora_border(wide, border, bias, *own, "")
    dys = copied_rows(given["dys"], r)
    backward = (dys, given["x"], s, border, *own[1:], True, [True, False], "")
    torch.library.opcheck(torch.ops.petl.lora_border_backward.default, backward, test_utils=tests)


def test_only_the_gradients_asked_for():
    given = arguments(ranks=(4, 0), ns=(16, 8))
    border, s = given["border"].nan_to_num(), given["x"].new_zeros(17, 4)
    wide = copied_rows(given["dys"], op.room(4))
    own = border, given["a"], given["b"], given["scales"]
    dx, _, _, dbias = op.reference_backward(wide, given["x"], s, *own, False, [False, True])
    assert dx.numel() == 0 and [grad.numel() for grad in dbias] == [0, 8]


def test_what_is_kept_is_the_latent_without_its_padding():
    given = arguments(torch.float32, ranks=(3, 0), ns=(16, 8))
    wide = copied_rows([given["x"]], op.room(3))
    own = given["biases"], given["a"], given["b"], given["scales"]
    _, s = op.reference(wide, given["border"].nan_to_num(), torch.zeros(24), *own)
    assert s.untyped_storage().nbytes() == 17 * 3 * 4


# ---- rows with room -------------------------------------------------------------------------------------------------


def test_rows_with_room_are_found_again():
    x = roomy(torch.empty(0), (2, 5, 6), 3)
    wide = whole_rows([x], 3)
    assert wide.shape == (10, 9) and wide.is_contiguous() and wide.data_ptr() == x.data_ptr()
    parts = list(x.split((2, 4), -1))
    assert whole_rows(parts, 3).data_ptr() == x.data_ptr()
    assert whole_rows(parts[::-1], 3) is None and whole_rows([x], 2) is None and whole_rows(parts[:1], 3) is None
    one_row = roomy(torch.empty(0), (1, 1, 6), 3)
    assert whole_rows([one_row], 3).shape == (1, 9)


def test_somebodys_tensor_has_no_room():
    whole = torch.zeros(10, 20)
    assert whole_rows([whole[:5, :17]], 3) is None  # other rows of the same memory
    assert whole_rows([whole[:, 3:]], 3) is None
    assert whole_rows([torch.zeros(10, 17)], 3) is None
    assert whole_rows([torch.zeros(20, 10).T[:, :17]], 3) is None


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "dropout_add_norm"])
def test_norms_leave_room_and_have_the_same_values(name):
    draw = contract.source(torch.float32)
    x, w = draw(2, 3, 8), draw(8)
    own = {"layer_norm": (x, w, w, 1e-5), "rms_norm": (x, w, 1e-5)}
    own["dropout_add_norm"] = x, x, w, w, 1e-5, 0.0, None, True
    place = 1 if name == "dropout_add_norm" else 0
    with below_autograd("cpu"):
        narrow, wide = run(name, *own[name], "")[place], run(name, *own[name], "", 5)[place]
    assert torch.equal(narrow, wide) and whole_rows([wide], 5).shape == (6, 13)


@pytest.mark.parametrize("rooms", [(), (5,), (0,), (5, 8), (0, 8)])
def test_attention_leaves_its_gradients_side_by_side(rooms):
    given = parity.attention_arguments(contract.source(torch.float32), queries=5, keys=5)
    names = ("q", "k", "v")
    rest = [given[name] for name in ("mask", "bias", "prefix_k", "prefix_v", "causal", "scale", "dropout", "seed")]
    q, k, v = (given[name] for name in names)
    with below_autograd("cpu"):
        o, lse = run("attention", q, k, v, *rest, None, None, None, "")
        given_back = given["do"], q, k, v, o, lse, *rest, False, None, None, None, False, ""
        expected, found = run("attention_backward", *given_back), run("attention_backward", *given_back, list(rooms))
    for a, b in zip(expected[:3], found[:3], strict=True):
        assert torch.equal(a, b)
    rows = [part.transpose(1, 2).flatten(2) for part in found[:3]]
    if len(rooms) == 1:
        assert whole_rows(rows, rooms[0]) is not None
    elif rooms:
        assert whole_rows(rows[:1], rooms[0]) is not None and whole_rows(rows[1:], rooms[1]) is not None
