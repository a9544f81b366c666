"""Registers ops with PyTorch, runs them below its dispatcher, and gives them their autograd rules."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from petl_kernels.dispatch import Kernel
from petl_kernels.errors import InputError

_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]  guards and keys of the dispatcher have no public names

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# The length of each list of tensors among some values, None for a value that is no list; None where none is.
_Sizes = Sequence[int | None] | None
# Name of an op -> its kernel for every device, as it was registered.
_kernels: dict[str, Kernel] = {}


def define(name: str, schema: str, kernel: Kernel, fake: Kernel, autocast: tuple[int, ...] = ()) -> None:
    """Registers ``petl::name``: its schema, the kernel for every device, and the shape-only kernel.

    ``autocast``: positions of the activations, which ``torch.autocast`` casts as it does for ``F.linear``.
    Parameters are not among them: the kernel casts those itself, so that no cast copy is kept for backward.
    """
    qualname = f"petl::{name}"
    torch.library.define(qualname, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualname, "CompositeExplicitAutograd")(kernel)
    torch.library.register_fake(qualname)(fake)  # pyright: ignore[reportUnknownMemberType]
    overload = getattr(torch.ops.petl, name).default
    for device, key in AUTOCAST_KEYS.items():
        torch.library.impl(qualname, key)(_autocast_kernel(overload, device, key, autocast))
    _kernels[name] = kernel


def run(name: str, *args: Any) -> Any:
    """Returns the values of ``petl::name``, for a caller that has checked the arguments and has a gradient of its own.

    The kernel is called without the dispatcher, which takes longer than the kernels of a small layer. Only where a
    dispatch mode is on (fake tensors, counters of bytes or operations) does the call go where the mode sees it.
    The caller is inside ``below_autograd``.
    """
    if _C._len_torch_dispatch_stack():
        return getattr(torch.ops.petl, name).default(*args)
    return _kernels[name](*args)


@contextmanager
def below_autograd(device: str) -> Generator[None]:
    """Opens a block in which autograd records nothing and autocast on ``device`` casts nothing."""
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, AUTOCAST_KEYS.get(device, "AutocastCPU")))
    with _C._AutoDispatchBelowAutograd(), _C._ExcludeDispatchKeyGuard(keys):
        yield


def _autocast_kernel(overload: Kernel, device: str, key: str, positions: tuple[int, ...]) -> Kernel:
    # torch.library.register_autocast fixes the dtype when it registers and casts the parameters too.
    keyset = _C.DispatchKeySet(getattr(_C.DispatchKey, key))

    def kernel(*given: Any) -> Any:
        args = list(given)
        for i in positions:
            args[i] = _cast(args[i], torch.get_autocast_dtype(device))
        with _C._ExcludeDispatchKeyGuard(keyset):
            return overload(*args)

    return kernel


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == torch.float64 else x.to(dtype)


def differentiate(
    name: str, save: Callable[[Any, Sequence[Any], Any], None], backward: Callable[..., Sequence[Any]]
) -> None:
    """Registers the autograd rule of ``petl::name``.

    ``save(ctx, inputs, output)`` keeps what backward needs. ``backward(ctx, needs, *grads)`` returns one gradient per
    input; ``needs``, the inputs, the outputs and the gradients have the nesting of the schema (lists stay lists).

    Gradients cannot be differentiated: with ``create_graph=True`` backward raises InputError.
    ``torch.library.register_autograd`` does the same, at 30 µs a call and 200 µs for an op with lists: more than the
    kernels of a small layer take on a GPU.
    """
    overload = getattr(torch.ops.petl, name).default
    takes, gives = _lists(overload._schema.arguments), _lists(overload._schema.returns)

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, sizes: _Sizes, output_sizes: list[int | None], *flat: Any) -> Any:
            inputs = _nest(flat, sizes)
            with _C._AutoDispatchBelowAutograd():
                output = run(name, *inputs)
            save(ctx, inputs, output)
            ctx.sizes, ctx.output_sizes = sizes, None
            if isinstance(output, Tensor) or gives is None:
                return output
            output_sizes.extend(len(part) if lists else None for part, lists in zip(output, gives, strict=True))
            ctx.output_sizes = output_sizes
            return tuple(_flatten(output, output_sizes))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            _refuse_second_derivatives(name)
            needs = _nest(ctx.needs_input_grad[2:], ctx.sizes)
            return None, None, *_flatten(backward(ctx, needs, *_nest(grads, ctx.output_sizes)), ctx.sizes)

    apply = cast(Kernel, Rule.apply)  # pyright: ignore[reportUnknownMemberType]

    def kernel(*inputs: Any) -> Any:
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*inputs)):
            with _C._AutoDispatchBelowAutograd():
                return overload(*inputs)
        # A last input that has its default is left out by PyTorch.
        sizes = takes and [len(value) if lists else None for value, lists in zip(inputs, takes, strict=False)]
        output_sizes: list[int | None] = []
        output = apply(sizes, output_sizes, *_flatten(inputs, sizes))
        return output if gives is None else tuple(_nest(output, output_sizes))

    torch.library.impl(f"petl::{name}", "Autograd")(kernel)


def _refuse_second_derivatives(name: str) -> None:
    # The kernels of gradients have no rule of their own: second derivatives through them would silently be zeros.
    if torch.is_grad_enabled():
        raise InputError(
            f"{name}: its gradient cannot be differentiated again (create_graph=True): expected first derivatives only"
        )


def _lists(places: Sequence[Any]) -> list[bool] | None:
    """Returns which of a schema's arguments or results are lists of tensors; None where none is."""
    found = [str(place.type) == "List[Tensor]" for place in places]
    return found if any(found) else None


def _flatten(values: Sequence[Any], sizes: _Sizes) -> Sequence[Any]:
    if sizes is None:
        return values
    flat: list[Any] = []
    for value, size in zip(values, sizes, strict=True):
        flat.append(value) if size is None else flat.extend(value)
    return flat


def _nest(flat: Sequence[Any], sizes: _Sizes) -> Sequence[Any]:
    if sizes is None:
        return flat
    values: list[Any] = []
    first = 0
    for size in sizes:
        values.append(flat[first] if size is None else list(flat[first : first + size]))
        first += 1 if size is None else size
    return values


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(like: Tensor) -> Tensor:
    """Returns the shape-(0,) tensor that stands for "not wanted" or "absent" where a schema has no None."""
    return like.new_empty(0)


def present(tensor: Tensor) -> Tensor | None:
    """Returns ``tensor``, or None for the shape-(0,) tensor of ``empty``."""
    return None if tensor.dim() == 1 and tensor.shape[0] == 0 else tensor
