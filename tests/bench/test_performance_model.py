"""bench/model.py: predictions grow with the work, and the limits of DESIGN §7 come out of the arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import counts  # noqa: E402
import model  # noqa: E402
from counts import Counts, Launch  # noqa: E402

H200 = model.DEVICES["H200"]


@pytest.mark.parametrize("card", model.DEVICES)
def test_no_prediction_falls_when_there_are_more_tokens(card):
    device = model.DEVICES[card]
    for few, many in zip(model.entries(1024), model.entries(8192), strict=True):
        assert few[:3] == many[:3]
        assert model.predicted(few.ours, device) < model.predicted(many.ours, device), few[:3]
        assert model.predicted(few.limit, device) < model.predicted(many.limit, device), few[:3]


@pytest.mark.parametrize("card", model.DEVICES)
def test_nothing_is_faster_than_its_limit(card):
    for entry in model.entries():
        ours, limit = (model.predicted(each, model.DEVICES[card]) for each in (entry.ours, entry.limit))
        assert ours >= 0.999 * limit, entry[:3]


@pytest.mark.parametrize(("d", "limit"), [(1024, 1.11), (2048, 1.06), (4096, 1.03)])
def test_limit_of_lora(d, limit):
    assert round(model.lora_limit(H200, 8192, d, 16), 2) == limit


def test_a_launch_takes_the_longest_of_its_three_bounds_and_the_launch_itself():
    device = model.Device(bf16=1e12, fp32=4e11, bandwidth=1e10, l2=1000, products=0.5, copies=0.5, launch=1e-6)

    def seconds(**bounds):
        return model.launch_seconds(Launch("", library=True, **bounds), device)

    assert seconds(flops=10**9) == pytest.approx(2e-3 + 1e-6)
    assert seconds(bytes=10**7) == pytest.approx(2e-3 + 1e-6)
    assert seconds(instructions=4e8) == pytest.approx(2e-3 + 1e-6)
    assert seconds(flops=10**9, bytes=10**6, instructions=1e6) == pytest.approx(2e-3 + 1e-6)
    assert seconds(bytes=10**7, cached=10**7, working_set=800) == pytest.approx(1e-6)
    assert seconds(bytes=10**7, cached=10**7, working_set=801) == pytest.approx(2e-3 + 1e-6)
    own = model.launch_seconds(Launch("", flops=10**9), device)
    assert own == pytest.approx(2e-3 / model.OURS + 1e-6)
    assert model.predicted(Counts(1, 1), device) is None


def test_cards_are_found_by_the_name_that_cuda_gives():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100 80GB",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA H200": "H200",
        "NVIDIA L4": "L4",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
    }
    for card, name in names.items():
        assert model.device_of(card) is model.DEVICES[name]
    assert model.device_of("NVIDIA L40S") is None and model.device_of("Tesla T4") is None


def test_comparison_with_a_run(tmp_path):
    """A product of 1 ms and a pass of 2 ms at the run's own rates, measured at twice and half of that."""
    rates = {"copy": 1e10, "matmul": {"bfloat16": 1e12}}

    def bench(op, flops, moved, seconds, implementation="ours"):
        info = {"op": op, "flops": flops, "bytes": moved, "dtype": "bfloat16", "implementation": implementation}
        return {"group": "", "extra_info": info, "stats": {"median": seconds}}

    benches = [
        bench("frozen_linear", 10**9, 10**3, 2e-3),
        bench("frozen_linear", 10**9, 10**3, 9.0, "eager"),
        bench("dropout_add", 0, 2 * 10**7, 1e-3),
    ]
    path = tmp_path / "ops.json"
    path.write_text(json.dumps({"machine_info": {"rates": rates}, "benchmarks": benches}))
    found = {op: (runs, ratio) for op, runs, ratio, _ in model.compare(path)}
    assert found == {"frozen_linear": (1, pytest.approx(2.0)), "dropout_add": (1, pytest.approx(0.5))}


def test_the_document_holds_what_the_model_says():
    text = model.DOCUMENT.read_text(encoding="utf-8")
    for line in [*model.targets(), *model.rows()]:
        assert f"| {' | '.join(line)} |" in text, "python bench/model.py --markdown writes it anew"


def test_a_copy_is_two_arrays():
    assert counts.streams(2, 1000, 2).bytes == 4000
