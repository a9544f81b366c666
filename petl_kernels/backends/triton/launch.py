"""Starts kernels: the first launch for a kind of arguments is Triton's own, the later ones go straight to its result.

``kernel[grid](...)`` binds every argument by name, describes all of them and the options in a string and looks its
compiled kernel up with that, some 40 times a layer (``petl-mt bench host`` times it). Here the key has what Triton
compiles anew for and nothing else: the dtype of a pointer and whether 16 divides it, whether an integer is 1, a
multiple of 16 or needs 64 bits, which arguments are None, how long a tuple is (``csrc/host/launch_key.cpp``, or
Triton's own function where there is no compiler), and constants, warps and stages. A compiled kernel therefore only
meets arguments for which Triton would have chosen it. Integers of ``do_not_specialize`` are told apart too: an entry
more, and the same code.

Anything out of the ordinary goes Triton's way: the interpreter, hooks, debugging, instrumentation, arguments of
another kind, a backend or a version of Triton whose launch was not compared with this one. No tensor is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit
from triton.runtime.jit import JITFunction

from petl_kernels.extension import find_extension

# The versions of Triton whose JITFunction.run, CompiledKernel and specialisation were compared with this file.
COMPARED = {"3.6", "3.7", "3.8"}
_is_compared = ".".join(triton.__version__.split(".")[:2]) in COMPARED


class _Prepared(NamedTuple):
    """A compiled kernel and how it is started. ``compiled`` and ``kernel`` keep its code loaded and its key unique."""

    compiled: CompiledKernel
    kernel: JITFunction
    run: Any
    function: int
    metadata: Any
    constexprs: tuple
    used: tuple[tuple[dict, str, Any], ...]  # the globals that the kernel reads: Triton refuses to run if they change


_prepared: dict[tuple, _Prepared] = {}


def launch(kernel, grid: tuple[int, ...], *args, warps: int, stages: int, **constexprs) -> None:
    """Runs `kernel` on the device of its first tensor. FP fusion is set, since Triton 3.10 changes its default."""
    for tensor in args:
        if isinstance(tensor, torch.Tensor):
            break
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            _launch(kernel, grid, args, warps, stages, constexprs)
    else:
        _launch(kernel, grid, args, warps, stages, constexprs)


def _launch(kernel, grid: tuple[int, ...], args: tuple, warps: int, stages: int, constexprs: dict[str, Any]) -> None:
    if not _is_plain(kernel):
        _launch_by_triton(kernel, grid, args, warps, stages, constexprs)
        return
    device = driver.active.get_current_device()  # pyright: ignore[reportAttributeAccessIssue]  of GPU drivers
    given = launch_key(args)
    key = id(kernel), device, warps, stages, given, *constexprs, *constexprs.values()
    found = _prepared.get(key)
    if found is not None and _unchanged(found.used):
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)  # pyright: ignore[reportAttributeAccessIssue]
        found.run(x, y, z, stream, found.function, found.metadata, None, None, None, *args, *found.constexprs)
        return
    compiled = _launch_by_triton(kernel, grid, args, warps, stages, constexprs)
    if given is not None and _is_familiar(compiled, kernel, args, constexprs):
        _prepared[key] = _prepare(compiled, kernel, constexprs)


def _launch_by_triton(kernel, grid, args, warps, stages, constexprs):
    return kernel[grid](*args, **constexprs, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def _key_by_triton(args: tuple) -> tuple | None:
    """Returns what ``launch_key`` tells apart, as Triton's own function describes it; None for unknown arguments."""
    try:
        return jit.native_specialize_impl(BaseBackend, args, False, True, True)
    except (TypeError, OverflowError):
        return None


_extension = find_extension()
launch_key = _key_by_triton if _extension is None else _extension.launch_key


def _is_plain(kernel) -> bool:
    """Returns whether Triton's own launch would do nothing but find the compiled kernel and start it."""
    runtime = knobs.runtime
    try:
        return (
            _is_compared
            and type(kernel) is JITFunction
            and not (kernel.pre_run_hooks or kernel.debug or runtime.debug)
            and not (runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
            and runtime.add_stages_inspection_hook is None
            and not knobs.compilation.instrumentation_mode
        )
    except AttributeError:  # something else than a chain of hooks was set
        return False


def _unchanged(used: tuple[tuple[dict, str, Any], ...]) -> bool:
    for names, name, value in used:
        if names.get(name) is not value:
            return False
    return True


def _is_familiar(compiled, kernel: JITFunction, args: tuple, constexprs: dict[str, Any]) -> bool:
    """Returns whether the arguments are the kernel's first parameters, in order, and the constants all others."""
    params = kernel.params
    return (
        type(compiled) is CompiledKernel
        and compiled.metadata.target.backend == "cuda"
        and not any(param.is_constexpr for param in params[: len(args)])
        and all(param.is_constexpr for param in params[len(args) :])
        and {param.name for param in params[len(args) :]} == set(constexprs)
    )


def _prepare(compiled: Any, kernel: JITFunction, constexprs: dict[str, Any]) -> _Prepared:
    constants = tuple(constexprs[name] for name in kernel.arg_names[-len(constexprs) :]) if constexprs else ()
    used = tuple((names, name, names.get(name)) for (name, _), (_, names) in kernel.used_global_vals.items())
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    return _Prepared(compiled, kernel, run, function, metadata, constants, used)
