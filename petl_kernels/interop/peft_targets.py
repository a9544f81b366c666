"""PEFT's `target_modules`: the modules that it stands for, and how ours are written for it.

PEFT 0.21 matches a list with a path exactly or by ".name" at its end, and a string as a regular expression for the
whole path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.models.structure import base_modules


def write_targets(model: nn.Module, targets: tuple[str, ...] | str | None, paths: list[str]) -> list[str] | str:
    """Returns `target_modules` for PEFT: `targets` where PEFT reads that in the same way, else the names of `paths`."""
    if targets is None or targets == "all-linear":
        return short_names(model, paths)
    return targets if isinstance(targets, str) else sorted(targets)


def short_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Returns the last parts of `paths` if they match these modules and no others, else the whole paths; sorted."""
    paths = set(paths)
    names = {path.rpartition(".")[2] for path in paths}
    matched = {path for path, _ in base_modules(model) if path.rpartition(".")[2] in names}
    return sorted(names if matched == paths else paths)


def read_targets(model: nn.Module, content: dict) -> tuple[str, ...] | str:
    """Returns targets as our configs take them: the paths that are left where PEFT narrows them further, by excluded
    modules or to some layers."""
    targets = content.get("target_modules")
    if not targets or not isinstance(targets, (str, list)):
        raise InputError(f"target_modules {targets!r}: expected a list of names or a regular expression")
    excluded, layers, patterns = (content.get(k) for k in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    for key, value in (("layers_to_transform", layers), ("layers_pattern", patterns)):
        if value is not None and isinstance(targets, str):
            raise InputError(f"{key} {value!r}: expected none beside target_modules {targets!r}, which is no list")
    if patterns and layers is None:
        raise InputError(f"layers_pattern {patterns!r}: expected layers_to_transform beside it")
    paths = [path for path, _ in base_modules(model) if path]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model)
        if not excluded:
            return tuple(targets)
    if isinstance(targets, list):  # PEFT is content when one of the names matches, we want each to
        targets = [name for name in targets if any(_matches([name], path) for path in paths)] or targets
    if not excluded and layers in (None, []):
        return targets if isinstance(targets, str) else tuple(sorted(targets))
    numbers = [layers] if isinstance(layers, int) else layers
    left = [
        path
        for path in paths
        if _matches(targets, path)
        and not (excluded and _matches(excluded, path))
        and (not numbers or path in targets or _layer_index(path, patterns or []) in numbers)
    ]
    if not left:
        raise InputError("target_modules with exclude_modules or layers_to_transform leave no module of this model")
    return tuple(left)


def _all_linear(model: Any) -> list[str]:
    """Returns the paths of every linear layer but the output projection."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [path for path, module in base_modules(model) if isinstance(module, nn.Linear) and module is not head]


def _matches(targets: list[str] | str, path: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in targets)


def _layer_index(path: str, patterns: list[str] | str) -> int | None:
    """Returns the number of the layer that `path` is in: its first number, or the first after one of `patterns`."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next(filter(None, (re.match(expression, path) for expression in expressions)), None)
    return int(match.group(1)) if match else None
