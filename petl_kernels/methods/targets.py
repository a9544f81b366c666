"""Modules of a model that a method's ``targets`` name."""

from __future__ import annotations

import difflib
import re

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.models.structure import base_modules, describe


def find_targets(model: nn.Module, targets: tuple[str, ...] | str, kinds: tuple[type, ...], method: str) -> list[str]:
    """Returns the paths of the modules that ``targets`` names, in the model's order.

    targets: names that match a path exactly or by ".name" at its end; a string is a regular expression for whole paths,
    or "all-linear" for every linear layer inside the encoder's and decoder's layers. Each name must match, and match
    modules of ``kinds`` only.
    Raises InputError for a name that matches nothing, listing near ones.
    """
    if targets == "all-linear":
        return list(describe(model).linears)
    modules = dict(base_modules(model))
    if isinstance(targets, str):
        expression = _compile(targets, method)
        found = [path for path in modules if path and expression.fullmatch(path)]
        if not found:
            raise InputError(f"{method} target {targets!r}: matches no module of {type(model).__name__}")
        return [path for path in found if _check_kind(path, modules[path], kinds, method)]
    found = set()
    for target in targets:
        matched = [path for path in modules if path == target or path.endswith(f".{target}")]
        if not matched:
            raise InputError(
                f"{method} target {target!r}: matches no module of {type(model).__name__}; "
                f"near: {', '.join(_near(target, modules, kinds))}"
            )
        found.update(path for path in matched if _check_kind(path, modules[path], kinds, method))
    return [path for path in modules if path in found]


def _compile(expression: str, method: str) -> re.Pattern:
    try:
        return re.compile(expression)
    except re.error as error:
        raise InputError(f"{method} target {expression!r}: not a regular expression ({error})") from None


def _check_kind(path: str, module: nn.Module, kinds: tuple[type, ...], method: str) -> bool:
    if not isinstance(module, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{method} target {path!r}: a {type(module).__name__}, expected {expected}")
    return True


def _near(target: str, modules: dict[str, nn.Module], kinds: tuple[type, ...]) -> list[str]:
    names = {path.rpartition(".")[2]: None for path, module in modules.items() if isinstance(module, kinds)}
    last = target.rpartition(".")[2]
    return difflib.get_close_matches(last, names, n=4, cutoff=0.3) or sorted(names)[:6]
