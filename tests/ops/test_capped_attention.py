"""Attention with capped scores and shared keys, against the formula and transformers' own of T5Gemma."""

from __future__ import annotations

import importlib

import pytest
import torch
from planning.peaks import peak_bytes
from torch.nn import functional as F
from transformers.models.t5gemma.modeling_t5gemma import eager_attention_forward

from petl_kernels import ops
from petl_kernels.errors import InputError
from petl_kernels.ops.cases.capped_attention import capped_attention_arguments
from petl_kernels.planning.scratch import scratch_bytes

from . import contract

op = importlib.import_module("petl_kernels.ops.capped_attention")  # the package shows the function of that name
OP = "capped_attention"
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def formula(q, k, v, mask, cap, scale, prefix_k=None, prefix_v=None):
    if prefix_k is not None:
        k, v = (
            torch.cat([own.transpose(0, 1).expand(len(q), -1, -1, -1), rows], 2)
            for own, rows in ((prefix_k, k), (prefix_v, v))
        )
        mask = None if mask is None else F.pad(mask, (prefix_k.shape[0], 0))
    k, v = (rows.repeat_interleave(q.shape[1] // k.shape[1], 1) for rows in (k, v))
    scores = scale * q @ k.mT
    scores = cap * torch.tanh(scores / cap) if cap else scores
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def leaves_of(given: dict) -> dict:
    names = ("q", "k", "v", "prefix_k", "prefix_v")
    return {name: given[name].requires_grad_() for name in names if given[name] is not None}


@pytest.mark.parametrize("chunk_bytes", [op.CHUNK_BYTES, 400, 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"prefix": 3}, {"mask": False, "cap": 0.0}, {"groups": 4}, {"groups": 1, "batch": 3}, {"keys": 9}],
    ids=str,
)
def test_the_formula(options, chunk_bytes, monkeypatch):
    """Values and gradients in float64, whole and in chunks of some sentences, of some queries, and of one."""
    monkeypatch.setattr(op, "CHUNK_BYTES", chunk_bytes)
    given = capped_attention_arguments(contract.source(FP64), **options)
    do, leaves = given.pop("do"), leaves_of(given)
    found = ops.capped_attention(**given)
    expected = formula(**{name: value for name, value in given.items() if name not in ("dropout", "seed")})
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(o, leaves.values(), do) for o in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_the_error_is_at_most_twice_that_of_transformers(dtype):
    given = capped_attention_arguments(contract.source(dtype), batch=3, queries=40, keys=40, d=16)

    class Module(torch.nn.Module):
        num_key_value_groups = 2

    def theirs(q, k, v):
        return eager_attention_forward(Module(), q, k, v, given["mask"], scaling=given["scale"], softcap=given["cap"])[
            0
        ].transpose(1, 2)

    def ours(q, k, v):
        return ops.capped_attention(q, k, v, given["mask"], given["cap"], given["scale"])

    def exact(q, k, v):
        return formula(q, k, v, given["mask"].double(), given["cap"], given["scale"])

    def values(function, dtype):
        leaves = [given[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v")]
        o = function(*leaves)
        return [o, *torch.autograd.grad(o, leaves, given["do"].to(dtype))]

    for own, other, right in zip(values(ours, dtype), values(theirs, dtype), values(exact, FP64), strict=True):
        errors = [(value.double() - right).norm() for value in (own, other)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * right.norm()


@pytest.mark.slow
def test_dropout_is_that_of_its_seed(monkeypatch):
    """Chunks change nothing, the share is the rate, and gradients are those of the masked probabilities."""
    given = capped_attention_arguments(contract.source(FP64), prefix=2, dropout=0.3, keys=200, queries=30)
    do, leaves = given.pop("do"), leaves_of(given)
    results = []
    for chunk_bytes in (op.CHUNK_BYTES, 700, 1):
        monkeypatch.setattr(op, "CHUNK_BYTES", chunk_bytes)
        o = ops.capped_attention(**given)
        results.append([o, *torch.autograd.grad(o, leaves.values(), do)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two)
    inputs = op._Inputs(
        *(given[name] for name in ("q", "k", "v", "mask", "prefix_k", "prefix_v")), 0, 1, 0.3, given["seed"]
    )
    kept = torch.cat([inputs.kept(chunk).flatten() for chunk in inputs.chunks()])
    assert abs((kept == 0).double().mean() - 0.3) < 0.02 and kept.unique().numel() == 2
    with torch.no_grad():
        assert not torch.equal(ops.capped_attention(**given | {"seed": None}), results[0][0])
    given = {name: value for name, value in given.items() if value is None or not torch.is_tensor(value)}
    small = capped_attention_arguments(contract.source(FP64), batch=1, queries=3, keys=4, d=2, prefix=2, dropout=0.3)
    small.pop("do")
    tensors = leaves_of(small)
    torch.autograd.gradcheck(
        lambda *own: ops.capped_attention(**small | dict(zip(tensors, own, strict=True))), [*tensors.values()]
    )


def test_saves_inputs_and_output_alone():
    given = capped_attention_arguments(contract.source(BF16), prefix=3)
    given.pop("do")
    leaves = leaves_of(given)
    saved = contract.bytes_saved(lambda: ops.capped_attention(**given), [*leaves.values(), given["mask"]])
    assert saved == given["q"].nbytes  # the output


def test_opcheck():
    given = capped_attention_arguments(contract.source(FP32), prefix=3)
    do = given.pop("do")
    leaves_of(given)
    overloads = torch.ops.petl.capped_attention.default, torch.ops.petl.capped_attention_backward.default
    torch.library.opcheck(overloads[0], (*given.values(), ""))
    detached = [own.detach() if torch.is_tensor(own) else own for own in given.values()]
    o = overloads[0](*detached, "")
    torch.library.opcheck(overloads[1], (do, *detached[:3], o, *detached[3:], ""))


def test_no_queries_and_no_sentences():
    for sizes in ({"batch": 0}, {"queries": 0}):
        given = capped_attention_arguments(contract.source(FP32), **{"mask": False, **sizes})
        do, leaves = given.pop("do"), leaves_of(given)
        o = ops.capped_attention(**given)
        assert o.shape == given["q"].shape
        grads = torch.autograd.grad(o, leaves.values(), do)
        assert sizes == {"batch": 0} or not any(grad.any() for grad in grads)


WRONG = [
    ({"q": torch.zeros(2, 3, 4)}, "q has shape (2, 3, 4): expected (batch, heads, length, features)"),
    ({"k": torch.zeros(2, 3, 13, 8)}, "k has shape (2, 3, 13, 8): expected (2, a divisor of 4, length, 8)"),
    ({"v": torch.zeros(2, 2, 12, 8)}, "v has shape (2, 2, 12, 8): expected that of k, (2, 2, 13, 8)"),
    ({"mask": torch.ones(2, 1, 9, 13).bool()}, "mask is torch.bool of shape (2, 1, 9, 13): expected constants to add"),
    ({"mask": torch.ones(2, 4, 9, 13)}, "expected constants to add, (2 or 1, 1, 9 or 1, 13)"),
    ({"prefix_k": torch.zeros(3, 2, 8)}, "prefix_v is None and the other half is not: expected both or none"),
    ({"prefix_k": torch.zeros(3, 4, 8), "prefix_v": torch.zeros(3, 4, 8)}, "prefix_k has shape (3, 4, 8): expected"),
    ({"cap": -1.0}, "cap is -1.0: expected a number above 0, or 0 for none"),
    ({"dropout": 1.0}, "dropout is 1.0: expected a number in [0, 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_input(change, message):
    given = capped_attention_arguments(contract.source(FP32)) | change
    given.pop("do")
    with pytest.raises(InputError) as error:
        ops.capped_attention(**given)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("chunk_bytes", [2**24, 100_000, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"prefix": 5, "mask": False}], ids=str)
def test_planned_bytes_are_at_least_the_measured_ones(options, chunk_bytes, monkeypatch):
    """And at most some copies of keys and values more; a plan's slack is megabytes."""
    monkeypatch.setattr(op, "CHUNK_BYTES", chunk_bytes)
    given = capped_attention_arguments(contract.source(FP32), 3, 4, 2, 120, 130, 16, **options)
    do = given.pop("do")
    forward, backward = torch.ops.petl.capped_attention.default, torch.ops.petl.capped_attention_backward.default
    arguments = tuple(given.values())
    o = op.reference(*arguments)
    calls = (
        (forward, op.reference, arguments),
        (
            backward,
            op.reference_backward,
            (do, *arguments[:3], o, *arguments[3:]),
        ),
    )
    for function, kernel, passed in calls:
        living, results = [own for own in passed if isinstance(own, torch.Tensor)], []
        peak = peak_bytes(lambda f=kernel, a=passed, r=results: r.append(f(*a)), living)
        outputs = results[0] if isinstance(results[0], tuple) else results
        inside = peak - sum(own.nbytes for own in (*living, *outputs))
        planned = scratch_bytes(function, (*passed, ""))
        assert inside <= planned + 4096, (inside, planned)
        assert planned <= 2 * inside + 20 * given["q"].nbytes, (inside, planned)
