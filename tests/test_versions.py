"""Checks of installed versions by the ranges of pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from petl_kernels import InputError, versions

ROOT = Path(versions.__file__).parents[1]
WITH_RANGES = ("torch", "transformers", "peft", "triton", "accelerate", "bitsandbytes", "sacrebleu", "numpy")
REQUIREMENTS = ["torch<2.16,>=2.11", 'transformers<5.25,>=5.17; extra == "hf"', 'rich>=13; extra == "mt"', "protobuf"]


@pytest.fixture
def installed(monkeypatch):
    """installed(name=version): what is found here, with the ranges above."""

    def install(**found):
        def version(name):
            if name not in found:
                raise metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(versions.metadata, "version", version)
        monkeypatch.setattr(versions.metadata, "requires", lambda _: REQUIREMENTS)
        monkeypatch.setattr(versions, "_FILE", Path("no such file"))
        versions.check.cache_clear()

    yield install
    versions.check.cache_clear()


@pytest.mark.parametrize("version", ["5.17.0", "5.17", "5.24.3", "5.20.0.dev0"])
def test_inside_of_the_range_nothing_is_said(version, installed):
    installed(transformers=version, torch="2.13.0+cpu", rich="99")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("transformers", "torch", "rich", "protobuf", "not-installed"):
            versions.check(name)


def test_older_is_refused_with_the_range(installed):
    installed(transformers="4.57.6")
    for _ in range(2):  # not only the first time
        with pytest.raises(InputError, match=r"^transformers 4\.57\.6 is older .* expected transformers>=5.17,<5.25$"):
            versions.check("transformers")


def test_a_version_without_numbers_is_refused_as_older(installed):
    installed(transformers="unknown")
    with pytest.raises(InputError, match=r"^transformers unknown is older .* expected transformers>=5.17,<5.25$"):
        versions.check("transformers")


def test_newer_is_said_once_with_the_range(installed):
    installed(torch="2.16.0a0+git123", transformers="6.0.0")
    with pytest.warns(UserWarning, match=r"^torch 2\.16\.0a0\+git123 is newer .* expected torch>=2.11,<2.16$"):
        versions.check("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check("torch")
    with pytest.warns(UserWarning, match="^transformers 6.0.0 is newer"):
        versions.check("transformers")


def test_an_old_library_stops_what_uses_it(installed, tmp_path):
    from methods.models import build

    import petl_kernels as pk
    from petl_kernels.interop.hf import load_config

    model = build("m2m100")
    installed(transformers="5.0.0")
    for use in (lambda: pk.lean(model), lambda: load_config(tmp_path), lambda: pk.adapt(model, pk.PrefixTuning(2))):
        with pytest.raises(InputError, match="transformers 5.0.0 is older"):
            use()


def test_ranges_have_both_ends():
    found = versions.ranges()
    assert all(None not in found[name] for name in WITH_RANGES)


def test_constraints_are_the_ends_that_stand_in_the_project_file():
    oldest, newest = (versions.constraints(end).splitlines() for end in ("oldest", "newest"))
    assert sorted(line.partition("==")[0] for line in oldest) == sorted(WITH_RANGES)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{line}"' in text for line in newest)
    assert all(f'"{line.replace("==", ">=")},<' in text for line in oldest)
    without = versions.constraints("oldest", but=("torch", "triton")).splitlines()
    assert without == [line for line in oldest if not line.startswith(("torch", "triton"))]


def test_pins_are_inside_of_the_ranges():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    found = versions.ranges()
    for name in WITH_RANGES:
        least, below = (versions._release(end) for end in found[name])
        assert least <= versions._release(pins[name]) < below


def test_the_program_says_in_one_line_that_pytorch_is_too_old():
    program = (
        "from importlib import metadata\nreal = metadata.version\n"
        "metadata.version = lambda name: '2.10.0' if name == 'torch' else real(name)\nimport petl_mt.cli"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"petl-mt: torch 2\.10\.0 is older than what petl-kernels works with: .*\n", done.stderr)
