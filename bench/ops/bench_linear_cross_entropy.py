"""linear_cross_entropy with a frozen weight beside its two products alone (the limit), eager PyTorch on full logits,
and PyTorch's own chunked loss. Time, and the most memory that one step takes beside its inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import peak_memory, record, step
from shapes import TOKENS, VOCABULARIES
from torch import Tensor

from petl_kernels import ops

SMOOTHING = 0.1


def inputs(name: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    tokens, (d, words) = TOKENS[device], VOCABULARIES[name]
    hidden = torch.randn(tokens, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(words, d, device=device, dtype=torch.bfloat16).div_(d**0.5)
    return hidden, weight, torch.randint(0, words, (tokens,), device=device)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=SMOOTHING)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=SMOOTHING)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Without label smoothing: with it, PyTorch 2.13 falls back to full logits."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


LOSSES = {"ours": ours, "eager": eager, "torch-unsmoothed": torch_chunked}


def products(hidden: Tensor, weight: Tensor) -> Callable:
    def run() -> None:
        with torch.no_grad():
            (hidden @ weight.T) @ weight
        if hidden.is_cuda:
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("implementation", ["limit", *LOSSES])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_linear_cross_entropy(benchmark, name, implementation, device):
    if (name, device) == ("nllb-600m", "cpu"):
        pytest.skip("twice the words of m2m-418m take a CPU twice the time, and show nothing else")
    hidden, weight, labels = inputs(name, device)
    if implementation == "limit":
        run = products(hidden, weight)
    else:
        few = hidden[:8].detach(), weight[:5000], labels[:8] % 5000
        exact = eager(few[0].double(), few[1].double(), few[2])
        torch.testing.assert_close(ours(*few).double(), exact, rtol=1e-3, atol=0)
        loss = LOSSES[implementation]
        run = step(lambda: loss(hidden, weight, labels), torch.ones((), device=device), (hidden,))
    run()
    benchmark.extra_info["peak_bytes"] = peak_memory(run, device)
    tokens, d = hidden.shape
    benchmark.group = f"linear_cross_entropy {name} {tokens}x{d}x{len(weight)} bfloat16 fwd+bwd"
    record(
        benchmark,
        run,
        op="linear_cross_entropy",
        implementation=implementation,
        flops=4 * tokens * d * len(weight),
        bytes_moved=2 * (2 * len(weight) * d + 2 * tokens * d),
        rounds=15 if device == "cuda" else 3,
    )
