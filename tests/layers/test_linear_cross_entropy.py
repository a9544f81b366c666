from __future__ import annotations

import torch

import petl_kernels as pk


def test_module_is_the_op_with_its_options():
    hidden, weight, bias = torch.randn(2, 3, 7, requires_grad=True), torch.randn(13, 7), torch.randn(1, 13)
    labels = torch.tensor([[1, 2, 3], [12, 0, 0]])
    options = {
        "label_smoothing": 0.1,
        "ignore_index": 0,
        "reduction": "sum",
        "logit_scale": 0.5,
        "smoothing": "fairseq",
        "chunk_bytes": 100,
    }
    module = pk.nn.LinearCrossEntropy(**options)
    loss = module(hidden, weight, labels, bias)
    assert torch.equal(loss, pk.linear_cross_entropy(hidden, weight, labels, bias, **options))
    loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert not list(module.parameters()) and "label_smoothing=0.1, ignore_index=0" in repr(module)
