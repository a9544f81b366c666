"""Result files of the bench, made up."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def entry(implementation: str, median: float, **changes) -> dict:
    """One entry of a result file: samples within 1% of ``median`` seconds unless ``iqr`` says otherwise."""
    half = changes.pop("iqr", 0.01 * median) / 2
    info = {
        "op": "lora_linear",
        "shape": "nllb-600m",
        "case": "r=16",
        "dtype": "bfloat16",
        "tokens": 512,
        "implementation": implementation,
        "flops": 2_000_000_000,
        "bytes": 10_000_000,
        "launches": None,
        "peak_bytes": 3 << 20,
        **changes,
    }
    stats = {"median": median, "q1": median - half, "q3": median + half, "rounds": info.pop("rounds", 15)}
    stats.update(min=median - 3 * half, max=median + 3 * half, data=[median])
    group = info.pop("group", f"{info['op']} {info['shape']} {info['case']} {info['tokens']} tokens {info['dtype']}")
    return {"group": group, "name": f"test[{implementation}]", "extra_info": info, "stats": stats}


def content(entries: list[dict], **changes) -> dict:
    """A whole result file."""
    machine = {
        "device": "cpu",
        "cpu_name": "Some CPU",
        "cores": 2,
        "threads": 1,
        "torch": "2.13.0",
        "rates": {"copy": 20e9, "matmul": {"bfloat16": 200e9, "float32": 100e9}},
        **changes,
    }
    commit = {"id": "0123456789abcdef", "time": "2026-11-21T10:00:00+00:00", "dirty": machine.pop("dirty", False)}
    return {"machine_info": machine, "commit_info": commit, "benchmarks": entries, "datetime": "2026-11-21T10:01:02"}
