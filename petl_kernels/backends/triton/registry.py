"""Registers the functions of this folder as Triton's kernels, under their own names.

They take bf16, fp16 and fp32; a call in another dtype goes to the reference. So does bf16 in the interpreter, whose
bf16 products are wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from petl_kernels.dispatch import kernel_of, register, triton_interprets

DTYPES = {torch.float16, torch.float32} | (set() if triton_interprets() else {torch.bfloat16})


def serves(function: Callable) -> Callable:
    """Decorator: ``function`` is Triton's kernel of its name, for activations (its first argument) in DTYPES."""
    return _register(function, room=False)


def serves_with_room(function: Callable) -> Callable:
    """Decorator: like ``serves``, for a function with a last argument that places its rows (``ops/room.py``)."""
    return _register(function, room=True)


def _register(function: Callable, room: bool) -> Callable:
    name = function.__name__

    @register(name, "triton", room_dtypes=DTYPES if room else ())
    def serve(first, *args):
        x = first[0] if isinstance(first, (list, tuple)) else first
        return (function if x.dtype in DTYPES else reference(name))(first, *args)

    return function


def reference(name: str) -> Callable:
    """Returns the reference's kernel of a name, which every kernel has."""
    found = kernel_of(name, "reference")
    assert found is not None, f"{name} has no reference"
    return found
