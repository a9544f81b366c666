"""bench/predict: predictions grow with the work, and the limits of its targets come out of the arithmetic."""

from __future__ import annotations

import json

import pytest

from bench.predict import against, cards, cases, counts, document
from bench.predict.counts import Counts, Launch
from bench.show import medians
from bench.show.medians import load, runs_in

H200 = cards.DEVICES["H200"]


@pytest.mark.parametrize("card", cards.DEVICES)
def test_no_prediction_falls_when_there_are_more_tokens(card):
    device = cards.DEVICES[card]
    for few, many in zip(cases.entries(1024), cases.entries(8192), strict=True):
        assert few[:2] == many[:2]
        assert cards.predicted(few.ours, device) < cards.predicted(many.ours, device), few[:3]
        assert cards.predicted(few.limit, device) < cards.predicted(many.limit, device), few[:3]


@pytest.mark.parametrize("card", cards.DEVICES)
def test_nothing_is_faster_than_its_limit(card):
    for entry in cases.entries():
        ours, limit = (cards.predicted(each, cards.DEVICES[card]) for each in (entry.ours, entry.limit))
        assert ours >= 0.999 * limit, entry[:3]


@pytest.mark.parametrize(("d", "limit"), [(1024, 1.11), (2048, 1.06), (4096, 1.03)])
def test_limit_of_lora(d, limit):
    assert round(cases.lora_limit(H200, 8192, d, (16,)), 2) == limit


def test_a_launch_takes_the_longest_of_its_three_bounds_and_the_launch_itself():
    device = cards.Device(bf16=1e12, fp32=4e11, bandwidth=1e10, l2=1000, products=0.5, copies=0.5, launch=1e-6)

    def seconds(**bounds):
        return cards.launch_seconds(Launch("", library=True, **bounds), device)

    assert seconds(flops=10**9) == pytest.approx(2e-3 + 1e-6)
    assert seconds(bytes=10**7) == pytest.approx(2e-3 + 1e-6)
    assert seconds(instructions=4e8) == pytest.approx(2e-3 + 1e-6)
    assert seconds(flops=10**9, bytes=10**6, instructions=1e6) == pytest.approx(2e-3 + 1e-6)
    assert seconds(bytes=10**7, cached=10**7, working_set=800) == pytest.approx(1e-6)
    assert seconds(bytes=10**7, cached=10**7, working_set=801) == pytest.approx(2e-3 + 1e-6)
    own = cards.launch_seconds(Launch("", flops=10**9), device)
    assert own == pytest.approx(2e-3 / cards.OURS + 1e-6)
    assert cards.predicted(Counts(1, 1), device) is None


def test_cards_are_found_by_the_name_that_cuda_gives():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100 80GB",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA H200": "H200",
        "NVIDIA L4": "L4",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
    }
    for card, name in names.items():
        assert cards.device_of(card) is cards.DEVICES[name]
    assert cards.device_of("NVIDIA L40S") is None and cards.device_of("Tesla T4") is None


def bench(op, flops, moved, seconds, implementation="ours", **names):
    info = {"op": op, "flops": flops, "bytes": moved, "dtype": "bfloat16", "implementation": implementation, **names}
    stats = {name: seconds for name in ("median", "q1", "q3", "min", "max")} | {"rounds": 1}
    return {"group": "", "name": "", "extra_info": info, "stats": stats}


def run_of(path, machine: dict, *benches):
    content = {"machine_info": machine, "commit_info": {}, "datetime": "", "benchmarks": benches}
    path.write_text(json.dumps(content))
    return path


def test_comparison_with_a_run(tmp_path):
    """A product of 1 ms and a pass of 2 ms at the run's own rates, measured at twice and half of that."""
    rates = {"copy": 1e10, "matmul": {"bfloat16": 1e12}}
    benches = (
        bench("frozen_linear", 10**9, 10**3, 2e-3),
        bench("frozen_linear", 10**9, 10**3, 9.0, "eager"),
        bench("dropout_add", 0, 2 * 10**7, 1e-3),
    )
    path = run_of(tmp_path / "ops.json", {"rates": rates}, *benches)
    found = {op: (runs, ratio) for op, runs, ratio, _ in against.compare(runs_in(path))}
    assert found == {"frozen_linear": (1, pytest.approx(2.0)), "dropout_add": (1, pytest.approx(0.5))}


def test_a_run_on_a_card_is_compared_with_what_the_model_says_today(tmp_path):
    names = {"shape": "nllb-600m", "tokens": 8192}
    old = {"predicted_seconds": 1.0, **names}
    benches = (
        bench("frozen_linear", 1, 1, 1e-3, case="", **old),
        bench("linear_cross_entropy", 1, 1, 1e-3, "ours, 300 MiB of logits", case="smoothing 0.1", **old),
        bench("quantize", 0, 1, 1e-3, case="int8", **names),  # has no kernel that is counted
    )
    path = run_of(tmp_path / "ops.json", {"device": "NVIDIA H200"}, *benches)
    linear = cards.predicted(counts.frozen_linear(8192, 1024, 1024, 2), H200)
    loss = cards.predicted(counts.linear_cross_entropy(8192, 1024, 256206, 2, 300 << 20), H200)
    found = {op: ratio for op, _, ratio, _ in against.compare(runs_in(path))}
    expected = {"frozen_linear": 1e-3 / linear, "linear_cross_entropy": 1e-3 / loss}
    assert found == {op: pytest.approx(ratio) for op, ratio in expected.items()}


@pytest.mark.parametrize("folder", ["cpu", "nvidia-h200"])
def test_a_case_is_known_by_the_names_of_its_benchmark(folder):
    """Operations and bytes are those that the benchmark has written beside the time."""
    known = 0
    for one in medians.run_of(document.RESULTS / folder, "ops").measurements:
        if one.implementation == "ours" and one.op in cases.WORK:
            size = 4 if one.dtype == "float32" else 2
            ours, _ = cases.work(one.op, one.shape, one.case, one.tokens, size)
            assert (ours.flops, ours.bytes) == (one.flops, one.bytes), one.group
            known += 1
    assert known > 40


def test_what_the_h200_took_is_what_the_model_says_or_its_kernels_were_replaced():
    """A line that no case needs any more has to go."""
    unused = set(against.REPLACED)
    for one, seconds in against.against(medians.run_of(document.H200_RESULTS, "ops")):
        ratio, found = one.median / seconds, against.replaced(one)
        if not against.KEPT[0] <= ratio <= against.KEPT[1]:
            assert found is not None, f"{one.group}: {ratio:.2f} of what is predicted"
            unused.discard(found)
    assert not unused


def test_tables_of_a_run_have_the_time_by_the_clock_and_say_what_was_not_timed(tmp_path):
    linear = {"shape": "nllb-600m", "case": "", "tokens": 8192}
    adapter = {"shape": "nllb-600m", "case": "m=256 fwd", "tokens": 8192}
    layer = {"shape": "nllb-600m", "case": "encoder", "tokens": 8192}
    benches = (
        bench("frozen_linear", 1, 1, 50e-6, "limit", wall_seconds=60e-6, **linear),
        bench("frozen_linear", 1, 1, 75e-6, wall_seconds=600e-6, **linear),
        bench("frozen_linear", 1, 1, 70e-6, "eager", wall_seconds=90e-6, **linear),
        bench("frozen_linear", 1, 1, 65e-6, "PEFT", wall_seconds=99e-6, **linear),
        bench("bottleneck_adapter", 1, 1, 10e-6, "limit", wall_seconds=20e-6, **adapter),
        bench("layer", 1, 1, 1e-3, "limit", wall_seconds=2e-3, **layer),
        bench("layer", 1, 1, 1.5e-3, wall_seconds=8e-3, **layer),
    )
    path = run_of(tmp_path / "ops.json", {"device": "NVIDIA H200"}, *benches)
    now = document.spelled(cards.predicted(counts.frozen_linear(8192, 1024, 1024, 2), H200))
    linear, adapter, *_ = document.measured_rows(load(path))
    over = (now, "65.0 µs (PEFT)", "600 µs", "99.0 µs")
    assert linear == ("frozen_linear", "nllb-600m", "", "50.0 µs", "75.0 µs", "1.50", *over)
    assert adapter == ("bottleneck_adapter", "nllb-600m", "m=256 fwd", "10.0 µs", "not timed", "", "", "", "", "")
    (_, layer) = document.layer_rows(load(path))
    assert layer == (
        "nllb-600m encoder",
        "ours",
        "1.50 ms",
        "1.50",
        "8.0 ms",
        "4.00",
    )


def test_the_document_holds_what_the_model_and_the_results_say():
    text = document.DOCUMENT.read_text(encoding="utf-8")
    tables = (
        document.targets(),
        document.rows(),
        document.layer_rows(medians.run_of(document.H200_RESULTS, "layers")),
        document.measured_rows(medians.run_of(document.H200_RESULTS, "ops")),
        against.REPLACED,
    )
    for line in (line for table in tables for line in table):
        assert f"| {' | '.join(line)} |" in text, "python -m bench.model --markdown writes it anew"


def test_a_copy_is_two_arrays():
    assert counts.streams(2, 1000, 2).bytes == 4000
