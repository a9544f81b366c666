"""The machine and the versions that a study's figures come from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from petl_kernels.units import format_size


def machine() -> dict[str, Any]:
    """Returns processor, memory, versions and commit, which a figure needs beside it."""
    about: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    about["host memory"] = format_size(psutil.virtual_memory().total)
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
    about["python"] = platform.python_version()
    for package in ("petl-kernels", "torch", "transformers", "sentencepiece", "sacrebleu", "Babel"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _commit()
    return {**about, "commit": commit} if commit else about


def _processor() -> str:
    cores = os.cpu_count()
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return f"{name[1].strip() if name else platform.processor() or platform.machine()} ({cores} cores)"


def _commit() -> str | None:
    """Returns the commit of the tree that this file stands in, with + when it is changed; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        if subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True).returncode:
            return None  # installed into an environment inside somebody else's repository
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")
