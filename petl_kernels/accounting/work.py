"""The matrix work of the linear layers in a piece of code, that inside C++ kernels included, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

_COUNTED = ("aten::mm", "aten::addmm")


def linear_flops(run: Callable[[], object]) -> int:
    """Returns the operations of the matrix products that ``run`` makes on the CPU, without those of attentions.

    Attention is left out because PyTorch's own has its products inside one kernel, which the profiler cannot see.
    """
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as profiled:
        run()
    return sum(_flops(event) for event in profiled.events() or () if not _in_attention(event))


def _flops(event) -> int:
    if event.name in _COUNTED:
        return event.flops
    if event.name == "aten::addmm_":  # the profiler has no formula for it
        _, (rows, inner), (_, cols), *_ = event.input_shapes
        return 2 * rows * inner * cols
    return 0


def _in_attention(event) -> bool:
    while event is not None:
        if event.name.startswith("petl_cpu::attention"):
            return True
        event = event.cpu_parent
    return False
