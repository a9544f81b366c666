"""dA, dB and the biases' sums on a second stream, beside dx's product: the shipped kernels, two events.

Captured in a CUDA graph, the two streams become parallel branches. dx's product leaves memory idle and the sums over
tokens leave the tensor cores idle; both fill every multiprocessor, so only the tails and the launches are certain to
overlap.
"""

from __future__ import annotations

import functools

import torch
from frame import pair, shipped


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _gradients(dx, da, db, dbias, dys, x, s, weights, a, b, scales) -> None:
    ds = shipped._rank_gradients(dys, b, scales, s)
    sums = functools.partial(shipped._adapter_gradients, da, db, dbias, dys, x, s, ds, scales, 0.0, None)
    product = functools.partial(shipped._input_gradient, dx, dys, ds, weights, a, 0.0, None, False)
    if not x.is_cuda:
        sums(), product()
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        sums()
    product()
    main.wait_stream(side)
    # The sums' scratch belongs to the side stream's pool. What the main stream made and the side stream read lives on
    # in this frame until main waits for side, so the allocator cannot hand it out too early.


_functions = pair(gradients=_gradients)
lora_linear, lora_linear_backward = _functions.lora_linear, _functions.lora_linear_backward
