"""What stands twice in the repository stands there alike: versions, variables, pages."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import petl_kernels
from petl_kernels import nn, ops
from petl_kernels.methods import METHODS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="runs in a source tree")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "csrc/README.md", "docs/index.md")
READ = re.compile(r"""environ(?:\.get\(|\.setdefault\(|\[)\s*"([A-Z_0-9]+)"|getenv\("([A-Z_0-9]+)"\)""")


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_version_has_one_place():
    assert 'dynamic = ["version"]' in text("pyproject.toml") and "\nversion:" not in text("CITATION.cff")
    assert f"## [{petl_kernels.__version__}]" in text("CHANGELOG.md")


def test_what_lies_beside_the_modules_is_installed_with_them():
    """package_data of setup.py has every file of the two packages that is no module."""
    found = re.search(r"package_data=(\{.*\}),", text("setup.py"))
    for package, patterns in ast.literal_eval(found[1]).items():
        folder = ROOT / ("python" if package == "petl_mt" else "") / package
        named = {path for pattern in patterns for path in folder.glob(pattern)}
        beside = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")]
        assert beside and not [path for path in beside if path not in named]


def test_setuptools_reads_the_version_without_importing_the_package():
    program = (
        "import sys; from setuptools.config.pyprojecttoml import read_configuration as read; "
        "print(read('pyproject.toml')['project']['version'], 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == [petl_kernels.__version__, "False"], run.stderr


def test_pre_commit_has_the_version_of_ruff_that_lint_has():
    pinned = re.search(r"^ruff==(.*)$", text("constraints.txt"), re.M)[1]
    assert f"ruff-pre-commit\n    rev: v{pinned}\n" in text(".pre-commit-config.yaml")


def test_every_variable_that_is_read_is_on_its_page():
    files = [ROOT / "setup.py", *(p for folder in ("petl_kernels", "python", "csrc", "bench") for p in sources(folder))]
    names = {
        name for file in files for found in READ.finditer(file.read_text("utf-8")) for name in found.groups() if name
    }
    assert {"PETL_CUDA", "TRITON_INTERPRET", "XDG_CACHE_HOME"} <= names
    page = text("docs/reference/environment.md")
    assert not [name for name in names if f"`{name}`" not in page]


def sources(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]


def built(path: str) -> str:
    """Returns a page with the output of its commands, as ``make docs`` builds it."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from output_of_commands import on_page_markdown
    finally:
        sys.path.pop(0)
    return on_page_markdown(text(path))


def test_the_page_of_methods_has_each_method():
    page = built("docs/reference/methods.md")
    assert all(re.search(rf"^{name}: ", page, re.M) for name in METHODS)
    classes = {variant.config.__name__ for variant in METHODS.values()}
    assert classes == set(re.findall(r"^::: petl_kernels\.(\w+)", page, re.M))


def test_the_page_of_commands_has_each_command():
    from petl_mt.cli import parser_for

    commands = next(action for action in parser_for("")._actions if action.dest == "command")
    assert set(re.findall(r"^<!-- petl-mt (\w+) --help -->", text("docs/reference/commands.md"), re.M)) == set(
        commands.choices
    )


def test_the_reference_has_each_public_name():
    pages = "".join(built(f"docs/reference/{path.name}") for path in (ROOT / "docs/reference").glob("*.md"))
    documented = set(re.findall(r"^::: petl_kernels\.(\S+)", pages, re.M))
    assert set(petl_kernels.__all__) - {"nn", "ops", "parity"} <= documented
    assert all(f"nn.{name}" in documented for name in nn.__all__)
    listed = {
        name for line in re.findall(r"members: \[(.*)\]", text("docs/reference/ops.md")) for name in line.split(", ")
    }
    assert {name for name in ops.__all__ if name != "OPS" and f"ops.{name}" not in documented} <= listed


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit_and_links_lead_somewhere(page):
    lines = text(page).splitlines()
    assert not [line for line in lines if len(line) > 120]
    links = re.findall(r"\]\(([^)#]+)|^\[[^\]]+\]: (\S+)", text(page), re.M)
    targets = [a or b for a, b in links if not (a or b).startswith("http")]
    assert not [target for target in targets if not ((ROOT / page).parent / target).exists()]


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a checkout")
def test_what_is_built_is_not_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {"LICENSE", "petl_kernels/py.typed", "python/petl_mt/py.typed"} <= set(files)
    assert not [file for file in files if file.startswith("build/") or file.endswith(".so")]
