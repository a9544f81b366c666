"""YAML files and single values of a configuration, read and checked for their types."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from petl_kernels.errors import InputError

LANGUAGE_KEYS = ("src_lang", "tgt_lang")  # beside the two files of a pair; no fields of a configuration


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and leaves the code of a language as it is written (no is Norwegian)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(name)
            if name in LANGUAGE_KEYS and isinstance(value, yaml.ScalarNode) and value.tag != "tag:yaml.org,2002:null":
                value.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def parse_yaml(text: Any) -> Any:
    """Returns the content of a YAML text or of an open file. Raises YAMLError, for a key that stands twice, too."""
    return yaml.load(text, _Loader)


def each_once(name: str, settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns KEY=VALUE settings of the option ``name`` as a mapping. Raises InputError for a key given twice."""
    result: dict[str, Any] = {}
    for key, value in settings:
        if key in result:
            raise InputError(f"{name} {key}: given twice; expected it once")
        result[key] = value
    return result


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises InputError for a file that cannot be read or holds something else."""
    try:
        with open(path, encoding="utf-8") as stream:
            values = parse_yaml(stream)
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"config {path}: expected a mapping of option names to values")
    return values


def typed(name: str, annotation: str, value: Any, where: str) -> Any:
    """Returns ``value`` as the type ``annotation`` of the field ``name``: YAML has 3e-4 as a string, and 1 for 1.0.

    Raises InputError for a value of another type; ``where`` is the file, in words.
    """
    if value is None and "None" in annotation:
        return None
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    for part in (p.strip() for p in annotation.split("|")):
        kind = kinds.get(part)
        if kind is None or (isinstance(value, bool) and kind is not bool):
            continue
        if isinstance(value, kind):
            return value
        if kind is float and isinstance(value, (int, str)):
            try:
                return float(value)
            except ValueError:
                continue
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
    if annotation.startswith(("list", "dict", "tuple")):
        wanted = {"l": list, "d": dict, "t": (list, tuple)}[annotation[0]]
        if isinstance(value, wanted) and _holds(annotation, value):
            return value
    raise InputError(f"{where}: {name} {value!r}: expected {annotation.replace(' | None', '')}")


def _holds(annotation: str, values: Any) -> bool:
    """Returns whether the members of a list, tuple or mapping have the types of ``annotation``."""
    if annotation.startswith("list[str]"):
        return all(isinstance(value, str) for value in values)
    if annotation.startswith("tuple[float"):
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return not annotation.startswith("dict[str") or all(isinstance(key, str) for key in values)
