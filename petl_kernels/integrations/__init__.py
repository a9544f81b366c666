"""Calls of other libraries that would leave adapters out: wrapped, so that a user's loop needs no callback.

``install`` runs when petl_kernels is imported. It imports nothing: a library's functions are wrapped when the library
is there, now or later. Models without adapters go straight through.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

# Module of another library -> the module here whose ``wrap`` changes it. It is imported with the library and no sooner.
_WRAPPED = {
    "transformers.modeling_utils": "petl_kernels.integrations.models",
    "transformers.trainer": "petl_kernels.integrations.trainer",
    "peft.tuners.tuners_utils": "petl_kernels.integrations.peft",
    "peft.peft_model": "petl_kernels.integrations.peft",
}


def install() -> None:
    """Wraps, once, what saves, resizes and resumes a model of transformers, and what puts PEFT's adapters on one."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(dict.fromkeys(_WRAPPED, _wrap)))


def _wrap(module: ModuleType) -> None:
    importlib.import_module(_WRAPPED[module.__name__]).wrap(module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``waiting[name](module)`` once the module ``name`` is imported; at once where it is already."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]):
        self.waiting = dict(waiting)
        for name in waiting.keys() & sys.modules.keys():
            self.waiting.pop(name)(sys.modules[name])

    def find_spec(self, name, path=None, target=None):
        then = self.waiting.pop(name, None)  # away while the other finders look for it
        if then is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:
                self.waiting[name] = then  # for the next attempt
                raise
            then(module)

        spec.loader.exec_module = exec_module
        return spec
