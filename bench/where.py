"""Places of a checkout's results, and its commit: importing this needs no build, before which `make gpu` begins."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def results_of(device: str) -> Path:
    """Returns the folder of the results of a device ("cpu", or "cuda" for the card that is there)."""
    from petl_kernels.machine import device_name

    return RESULTS / folder_name(device_name(device))


def folder_name(device: str) -> str:
    """Returns the name of a device's folder: "cpu", or "nvidia-h200" for "NVIDIA H200"."""
    return device.strip().replace(" ", "-").lower()


def commit() -> str:
    """Returns the commit that is checked out, "" where there is no git."""
    return git("rev-parse", "HEAD") or ""


def git(*arguments: str) -> str | None:
    """Returns what git prints in this checkout, from whatever folder it is called; None where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
