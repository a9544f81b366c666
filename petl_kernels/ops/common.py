"""What the ops share: registration with PyTorch, and the arguments that all of them refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from petl_kernels.errors import InputError

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# Name of an op -> its kernel for every device, as it was registered.
_kernels: dict[str, Callable] = {}


def define(name: str, schema: str, kernel: Callable, fake: Callable, autocast: tuple[int, ...] = ()) -> None:
    """Register ``petl::name``: its schema, the kernel for every device, and the shape-only kernel.

    ``autocast``: positions of the activations, which ``torch.autocast`` casts as it does for ``F.linear``.
    Parameters are not among them: the kernel casts those itself, so that no cast copy is kept for backward.
    """
    qualname = f"petl::{name}"
    torch.library.define(qualname, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualname, "CompositeExplicitAutograd")(kernel)
    torch.library.register_fake(qualname)(fake)
    overload = getattr(torch.ops.petl, name).default
    for device, key in _AUTOCAST_KEYS.items():
        torch.library.impl(qualname, key)(_autocast_kernel(overload, device, key, autocast))
    _kernels[name] = kernel


def run(name: str, *args):
    """Returns what ``petl::name`` returns, for a rule that has checked its arguments and has a gradient of its own.

    The kernel is called without the dispatcher, which takes longer than the kernels of a small layer. Only where a
    dispatch mode is on (fake tensors, counters of bytes or operations) does the call go where the mode sees it.
    To be called inside ``below_autograd``.
    """
    if torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.petl, name).default(*args)
    return _kernels[name](*args)


@contextmanager
def below_autograd(device: str) -> Iterator[None]:
    """A block in which autograd records nothing and autocast on ``device`` casts nothing."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _AUTOCAST_KEYS.get(device, "AutocastCPU")))
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(keys):
        yield


def _autocast_kernel(overload: Callable, device: str, key: str, positions: tuple[int, ...]) -> Callable:
    # torch.library.register_autocast fixes the dtype when it registers and casts the parameters too.
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args):
        args = list(args)
        for i in positions:
            args[i] = _cast(args[i], torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return overload(*args)

    return kernel


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == torch.float64 else x.to(dtype)


def differentiate(name: str, save: Callable, backward: Callable) -> None:
    """Register the autograd rule of ``petl::name``.

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
        def forward(ctx, sizes, output_sizes, *flat):
            inputs = _nest(flat, sizes)
            with torch._C._AutoDispatchBelowAutograd():
                output = run(name, *inputs)
            save(ctx, inputs, output)
            ctx.sizes, ctx.output_sizes = sizes, None
            if isinstance(output, Tensor) or gives is None:
                return output
            output_sizes.extend(len(part) if lists else None for part, lists in zip(output, gives, strict=True))
            ctx.output_sizes = output_sizes
            return tuple(_flatten(output, output_sizes))

        @staticmethod
        def backward(ctx, *grads):
            _refuse_second_derivatives(name)
            needs = _nest(ctx.needs_input_grad[2:], ctx.sizes)
            return None, None, *_flatten(backward(ctx, needs, *_nest(grads, ctx.output_sizes)), ctx.sizes)

    def kernel(*inputs):
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*inputs)
        # A last input that has its default is left out by PyTorch.
        sizes = takes and [len(value) if lists else None for value, lists in zip(inputs, takes, strict=False)]
        output_sizes = []
        output = Rule.apply(sizes, output_sizes, *_flatten(inputs, sizes))
        return output if gives is None else tuple(_nest(output, output_sizes))

    torch.library.impl(f"petl::{name}", "Autograd")(kernel)


def _refuse_second_derivatives(name: str) -> None:
    # The kernels of gradients have no rule of their own: what depends on them would get zeros, without a word.
    if torch.is_grad_enabled():
        raise InputError(
            f"{name}: its gradient cannot be differentiated again (create_graph=True): expected first derivatives only"
        )


def _lists(places: Sequence) -> list[bool] | None:
    """Returns which of a schema's arguments or results are lists of tensors; None where none is."""
    found = [str(place.type) == "List[Tensor]" for place in places]
    return found if any(found) else None


def _flatten(values: Sequence, sizes: Sequence[int | None] | None) -> Sequence:
    if sizes is None:
        return values
    flat = []
    for value, size in zip(values, sizes, strict=True):
        flat.append(value) if size is None else flat.extend(value)
    return flat


def _nest(flat: Sequence, sizes: Sequence[int | None] | None) -> Sequence:
    if sizes is None:
        return flat
    values, first = [], 0
    for size in sizes:
        values.append(flat[first] if size is None else list(flat[first : first + size]))
        first += 1 if size is None else size
    return values


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(like: Tensor) -> Tensor:
    """The shape-(0,) tensor that stands for "not asked for" or "absent" where a schema has no None."""
    return like.new_empty(0)


def present(tensor: Tensor) -> Tensor | None:
    """The inverse of ``empty`` for arguments: None for a shape-(0,) tensor."""
    return None if tensor.dim() == 1 and tensor.shape[0] == 0 else tensor


def check_activation(op: str, x: Tensor, name: str = "x") -> None:
    if x.dim() == 0:
        raise InputError(f"{op}: {name} has rank 0: expected (..., features)")
    if not x.is_floating_point():
        raise InputError(f"{op}: {name} has dtype {x.dtype}: expected a floating-point tensor")


def check_weight(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    """A frozen weight (N, K) of the dtype and device of x (..., K)."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise InputError(
            f"{op}: {name} has shape {shape(weight)}: expected (out, {x.shape[-1]}) for x of shape {shape(x)}"
        )
    check_frozen(op, name, weight, x)


def check_frozen(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    """A weight that is not trained, on the device of x and, where it is dense, of its dtype."""
    check_device(op, name, weight, x)
    if weight.dtype != x.dtype and not hasattr(weight, "parts") and not autocasts(x):
        raise InputError(f"{op}: {name} has dtype {weight.dtype}: expected that of x, {x.dtype}")
    if weight.requires_grad:
        raise InputError(f"{op}: {name} requires grad: expected a frozen weight (or use torch.nn.Linear)")


def check_parameter(op: str, name: str, parameter: Tensor, expected: tuple[int, ...], x: Tensor) -> None:
    """A parameter of one exact shape, on the device of x, of any floating-point dtype."""
    if tuple(parameter.shape) != expected:
        raise InputError(f"{op}: {name} has shape {shape(parameter)}: expected {expected}")
    if not parameter.is_floating_point():
        raise InputError(f"{op}: {name} has dtype {parameter.dtype}: expected a floating-point tensor")
    check_device(op, name, parameter, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputError(f"{op}: {name} is on {tensor.device}: expected the device of x, {x.device}")


def autocasts(x: Tensor) -> bool:
    return x.device.type in _AUTOCAST_KEYS and torch.is_autocast_enabled(x.device.type)


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
