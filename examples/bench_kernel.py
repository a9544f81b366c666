"""Times one op, forward and backward, with each backend that this machine has, and checks the result first."""

from functools import partial

import torch
from torch.utils.benchmark import Timer

from petl_kernels import ops

TOKENS, WIDTH, RANK = 512, 512, 16

torch.manual_seed(1)
device = "cuda" if torch.cuda.is_available() else "cpu"
make = partial(torch.randn, device=device)
x = make(TOKENS, WIDTH, requires_grad=True)
weight, bias = make(WIDTH, WIDTH) / WIDTH**0.5, make(WIDTH)  # frozen: no gradient is made
a = (make(RANK, WIDTH) / WIDTH**0.5).requires_grad_()
b = (make(WIDTH, RANK) / RANK**0.5).requires_grad_()
dy = make(TOKENS, WIDTH)


def step() -> list[torch.Tensor]:
    """Returns y and the gradients of x, a and b."""
    y = ops.lora_linear(x, weight, bias, a, b, scale=2.0)
    return [y, *torch.autograd.grad(y, (x, a, b), dy)]


with ops.use("reference"):
    expected = step()
for backend in ops.available_backends():
    with ops.use(backend):
        if ops.backend_of("lora_linear", device) != backend:
            continue  # it has no kernel of this op for the device
        worst = max(
            ((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(step(), expected, strict=True)
        )
        timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        milliseconds = timer.blocked_autorange(min_run_time=0.3).median * 1e3
    print(f"{backend:10} {milliseconds:7.3f} ms a step, relative difference from the reference {worst:.1e}")
