"""attention beside PyTorch's own, forward and backward, with a padding mask as training has it.

The limit is PyTorch's without a mask and without dropout. A packed row stands beside the same sentences in a padded
batch. "flash" is PyTorch's own flash kernel, which takes no mask: whole rows of the batch, or the sentences of a packed
row. It draws its dropout from the generator's state and not from a seed, so that a second forward pass, which makes
again what was not kept, would have another mask, and it runs on CUDA alone: a peer, and nothing that the package calls.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.predict import cases, counts
from bench.run.measure import measure
from bench.run.peers import compiled, peer, require
from bench.run.work import Case, differentiated
from bench.shapes import distinct, shape
from petl_kernels import ops
from petl_kernels.ops.philox import draw_seed
from petl_kernels.parity import boundaries

LENGTH = 128
# madlad-10b's heads of 256 are wider than the Triton kernel's blocks.
NAMES = [name for name in distinct("heads", "head_dim") if name != "madlad-10b"]


def inputs(heads: int, head_dim: int, dtype: torch.dtype, device: str, tokens: int):
    rows = max(1, tokens // LENGTH)
    q, k, v = (
        torch.randn(rows, LENGTH, heads, head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (rows, 1, 1, 1), device=device)
    return q, k, v, torch.arange(LENGTH, device=device) < lengths


def eager(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def sdpa(q, k, v, mask, dropout: float = 0.0):
    return F.scaled_dot_product_attention(q, k, v, mask, dropout)


def lengths(tokens: int) -> list[int]:
    """Returns lengths of sentences that fill a row: log-normal around 20 tokens, the same at each call."""
    generator, found = torch.Generator().manual_seed(0), []
    while sum(found) < tokens:
        drawn = (3 + 0.6 * torch.randn((), generator=generator)).exp()
        found.append(min(round(drawn.item()) + 1, tokens - sum(found)))
    return found


def packed(heads: int, head_dim: int, dtype: torch.dtype, device: str, tokens: int):
    sizes = lengths(tokens)
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    return q, k, v, boundaries(sizes, torch.device(device))


def padded(heads: int, head_dim: int, dtype: torch.dtype, device: str, tokens: int):
    sizes = torch.tensor(lengths(tokens), device=device)
    longest = int(sizes.max())
    q, k, v = (
        torch.randn(len(sizes), longest, heads, head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    return q, k, v, torch.arange(longest, device=device) < sizes[:, None, None, None]


def of_sentences(q, k, v, cu):
    return ops.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


def flash(q, k, v, dropout: float, cu=None, longest: int = LENGTH):
    """(batch, heads, length, head_dim), or such a packed row of sentences with their boundaries and longest length."""
    rows = (x.transpose(1, 2) if cu is None else x[0].transpose(0, 1) for x in (q, k, v))
    o, *_ = torch.ops.aten._flash_attention_forward(*rows, cu, cu, longest, longest, dropout, False, False)
    return o.transpose(1, 2) if cu is None else o.transpose(0, 1)[None]


def by_reference(q, k, v, cu):
    with ops.use("reference"):
        return of_sentences(q, k, v, cu)


@pytest.mark.parametrize("implementation", ["ours", "padded", peer("flash")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_attention(benchmark, name, dtype, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16")
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    sizes = lengths(s.tokens)
    functions = {
        "ours": of_sentences,
        "padded": ops.attention,
        "flash": lambda q, k, v, cu: flash(q, k, v, 0.0, cu, max(sizes)),
    }
    only_where_flash_runs(implementation, dtype, device)
    is_row = implementation != "padded"
    measure(
        benchmark,
        Case("packed_attention", name, s.tokens, dtype, device, f"{len(sizes)} sentences"),
        implementation,
        differentiated(functions[implementation]),
        functools.partial(packed if is_row else padded, s.heads, s.head_dim, getattr(torch, dtype), device),
        counts.attention(
            1, s.heads, s.tokens, s.tokens, s.head_dim, size, pairs=sum(n * n for n in sizes), sentences=len(sizes)
        ),
        by_reference if is_row else eager,
    )


def only_where_flash_runs(implementation: str, dtype: str, device: str) -> None:
    if implementation == "flash" and (device == "cpu" or dtype == "float32"):
        pytest.skip("PyTorch's flash kernel takes 16-bit numbers on CUDA")


@pytest.mark.parametrize("implementation", ["limit", "ours", "PyTorch", "eager", peer("flash"), peer("torch.compile")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_attention(benchmark, name, dtype, dropout, implementation, device):
    require(name, device, implementation, small=dtype == "bfloat16" and not dropout)
    if dropout and implementation in ("eager", "torch.compile"):
        pytest.skip("without dropout for those")
    only_where_flash_runs(implementation, dtype, device)
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    seed = draw_seed(torch.device(device)) if dropout else None
    functions = {
        "limit": lambda: lambda q, k, v, mask: sdpa(q, k, v, None),
        "ours": lambda: lambda q, k, v, mask: ops.attention(q, k, v, mask, dropout=dropout, seed=seed),
        "PyTorch": lambda: functools.partial(sdpa, dropout=dropout),
        "eager": lambda: eager,
        "flash": lambda: lambda q, k, v, mask: flash(q, k, v, dropout),
        "torch.compile": lambda: compiled(eager),
    }

    def formula(q, k, v, mask):
        if implementation != "ours":
            return eager(q, k, v, torch.ones_like(mask) if implementation == "flash" else mask)
        with ops.use("reference"):
            return ops.attention(q, k, v, mask, dropout=dropout, seed=seed)

    without_dropout = {
        "PyTorch": differentiated(sdpa),
        "flash": differentiated(lambda q, k, v, mask: flash(q, k, v, 0.0)),
    }
    rows = s.tokens // LENGTH
    scores = counts.attention(rows, s.heads, LENGTH, LENGTH, s.head_dim, size, mask=rows * LENGTH, dropout=dropout > 0)
    measure(
        benchmark,
        Case("attention", name, s.tokens, dtype, device, f"{rows}x{LENGTH} dropout {dropout:g}"),
        implementation,
        differentiated(functions[implementation]()),
        functools.partial(inputs, s.heads, s.head_dim, getattr(torch, dtype), device),
        cases.once(scores, 2) if implementation == "limit" else scores,
        None if implementation == "limit" else formula,
        without_dropout.get(implementation) if dropout else None,
    )
