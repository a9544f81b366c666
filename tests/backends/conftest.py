"""Triton's interpreter, at twice its speed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def language_patched_once_a_kernel() -> Iterator[None]:
    """Triton's interpreter puts its own functions into ``triton.language`` at each call of a kernel, and again at each
    call of a function within the kernel, which finds what is there and takes half of the time: here the latter does
    nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # what the kernel that runs has put its functions into

    @functools.cache
    def languages(fn) -> tuple[str, ...]:
        modules = {id(value) for value in fn.__globals__.values()}
        return tuple(one.__name__ for one in (interpreter.tl, interpreter.tl.core) if id(one) in modules)

    def patch_once(fn):
        if languages(fn) in patched:
            return interpreter._LangPatchScope()
        patched.add(languages(fn))
        return patch(fn)

    def call_and_forget(self, *args, **options):
        try:
            return call(self, *args, **options)
        finally:
            patched.clear()

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_patch_lang", patch_once)
        changes.setattr(interpreter.GridExecutor, "__call__", call_and_forget)
        yield
