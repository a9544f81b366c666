"""The versions of other libraries that this package works with: the ranges of pyproject.toml, and checks of them.

A library that is older than its range is refused when it is first used: it lacks names that are called, or computes in
other shapes. One that is newer mostly works, and is warned of once; a name that it no longer has is refused where it is
used (``models/transformers_names.py``).

    python -c 'from petl_kernels import versions; print(versions.constraints("oldest"))'
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from petl_kernels.errors import InputError

PROJECT = "petl-kernels"
_FILE = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[ (]*((?:[<>=!~]=?[\d.*]+,? ?)+)")


class VersionError(InputError, ImportError):
    """A library that is too old to work."""


@functools.cache
def check(name: str) -> None:
    """Compares the installed library ``name`` with its range. Raises VersionError where it is older, warns of a newer.

    Does nothing for a library that is not installed, or that has no range.
    """
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return
    least, below = ranges().get(name, ("0", None))
    expected = f"expected {name}>={least}" + (f",<{below}" if below else "")
    if _release(installed) < _release(least):
        raise VersionError(f"{name} {installed} is older than what {PROJECT} works with: {expected}")
    if below is not None and _release(installed) >= _release(below):
        warnings.warn(f"{name} {installed} is newer than what {PROJECT} is tested with: {expected}", stacklevel=2)


def ranges() -> dict[str, tuple[str, str | None]]:
    """Returns name -> (the oldest version that works, the first untested one or None), for each range with a start."""
    found = {}
    for requirement in _requirements():
        match = _REQUIREMENT.match(requirement)
        ends = dict(re.findall(r"(>=|<)(?!=)([\d.]+)", match[2])) if match else {}
        if match and ">=" in ends:
            found[match[1]] = ends[">="], ends.get("<")
    return found


def _requirements() -> list[str]:
    """Returns the requirements of pyproject.toml where this file lies in the project's folder, else those installed.

    An installation in place keeps the metadata of the day on which it was made.
    """
    text = _FILE.read_text(encoding="utf-8") if _FILE.is_file() else ""
    if f'name = "{PROJECT}"' in text:
        return re.findall(r'"([^"\n]+)"', text)
    return metadata.requires(PROJECT) or []


def _release(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version, (2, 13, 0) for "2.13.0+cpu"; none for one that begins with no number."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def constraints(end: str, but: Sequence[str] = ()) -> str:
    """Returns the ranges with both ends as a constraints file of pip, without the libraries ``but``.

    end: "oldest" for the start of each range, or "newest" for the whole range, of which pip takes the newest version.
    """
    both = {name: ends for name, ends in ranges().items() if None not in ends and name not in but}
    forms = {"oldest": "{}=={}", "newest": "{}>={},<{}"}
    return "\n".join(forms[end].format(name, *ends) for name, ends in both.items())
