"""``petl-mt bench``: the benchmarks under ``bench/`` of a checkout, in one command."""

from __future__ import annotations

from pathlib import Path

from petl_kernels.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[2]


def run(what: str, device: str | None, peers: bool) -> int:
    """Run the benchmarks of ``what`` ("ops") and write ``bench/results/<device>/<what>.json``.

    Returns pytest's exit code. Raises InputError where there is no checkout, no such benchmark or no such device.
    """
    import pytest
    import torch

    folder = CHECKOUT / "bench" / what
    if not folder.is_dir():
        raise InputError(f"bench {what}: no folder bench/{what} beside the package; run it from a checkout")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; expected cpu")
    results = CHECKOUT / "bench" / "results" / _name_of(device)
    results.mkdir(parents=True, exist_ok=True)
    arguments = [str(folder), "-o", "python_files=bench_*.py", "-q", "--device", device]
    arguments += ["--benchmark-json", str(results / f"{what}.json"), "--benchmark-columns=min,median,iqr,rounds"]
    return pytest.main([*arguments, *(["--peers"] if peers else [])])


def _name_of(device: str) -> str:
    import torch

    return torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else "cpu"
