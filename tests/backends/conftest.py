"""Triton's interpreter, at twice its speed."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    """Leaves out what Triton's interpreter does again and again, half of its time.

    It puts its own functions into ``triton.language`` at each call of a kernel, and again at each call of a function
    within the kernel, which finds them there: here the latter does nothing. And it makes its table of NumPy's dtypes
    anew for each value: here a dtype is looked up once.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):  # a Triton that does it in another way
        yield
        return
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

    language, find = interpreter.tl, interpreter._get_np_dtype
    known = {}  # dtypes of Triton -> those of NumPy

    def find_once(dtype):
        if isinstance(dtype, language.block_type):
            dtype = dtype.element_ty
        if type(dtype) is not language.dtype:  # a pointer
            return find(dtype)
        if dtype not in known:
            known[dtype] = find(dtype)
        return known[dtype]

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_patch_lang", patch_once)
        changes.setattr(interpreter.GridExecutor, "__call__", call_and_forget)
        changes.setattr(interpreter, "_get_np_dtype", find_once)
        yield
