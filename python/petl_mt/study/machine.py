"""The machine and the versions that a study's figures come from."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from petl_kernels import machine as here
from petl_kernels.units import format_size

PACKAGES = ("petl-kernels", "torch", "transformers", "sentencepiece", "sacrebleu", "Babel")


def machine() -> dict[str, Any]:
    """Returns processor, memory, versions and commit, which a figure needs beside it."""
    about: dict[str, Any] = {"processor": f"{here.processor()} ({here.cores()} cores)", "threads": here.threads()}
    about["host memory"] = format_size(here.total_bytes())
    if torch.cuda.is_available():
        about["device"] = here.device_name("cuda")
    about["python"] = platform.python_version()
    about |= {package: version for package in PACKAGES if (version := here.version(package)) is not None}
    commit = _commit()
    return {**about, "commit": commit} if commit else about


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
