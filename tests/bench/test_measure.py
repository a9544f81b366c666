"""bench/run: wrong results are refused, inputs rotate, and the report's names are written down."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from bench.ops import bench_attention, bench_linear_cross_entropy
from bench.predict import counts
from bench.run import check, clock, measure, memory, work


def inputs(tokens):
    return torch.randn(tokens, 8, requires_grad=True), torch.randn(4, 8)


def linear(x, weight):
    return x @ weight.T


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy @ ctx.saved_tensors[0], None


def test_check_accepts_the_formula_and_refuses_wrong_values_and_gradients():
    check.check(work.differentiated(linear), linear, inputs(6))
    check.check(work.forward_only(linear), linear, inputs(6))
    with pytest.raises(AssertionError, match="gradient 0"):
        check.check(work.differentiated(lambda x, w: 1.01 * linear(x, w)), linear, inputs(6))
    with pytest.raises(AssertionError, match="gradient 1"):
        check.check(work.differentiated(WrongGradient.apply), linear, inputs(6))


def test_copies_fill_the_cache_twice_and_are_drawn_anew(monkeypatch):
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1000)
    drawn = measure.copies(lambda: inputs(4), "cpu")  # 256 bytes each
    assert len(drawn) == 8 and sum(t.nbytes for each in drawn for t in each) >= 2000
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_rotation_takes_turns():
    seen = []
    run = measure.rotation([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(5):
        run()
    assert seen == [0, 1, 2, 0, 1]


def test_step_forms_the_leaves_gradients():
    x, weight = inputs(4)
    (dx,) = work.step(work.differentiated(linear)(x, weight))()
    assert dx.shape == x.shape
    assert not work.step(work.forward_only(linear)(x, weight))().requires_grad


def test_the_cache_of_this_machine_has_a_size():
    assert memory.cache_bytes("cpu") >= 1 << 18


@pytest.fixture
def enabled(benchmark, monkeypatch):
    """pytest-xdist disables benchmarks; these two time nothing that matters, and are in no table."""
    monkeypatch.setattr(benchmark, "disabled", False)
    monkeypatch.setattr(benchmark, "_add_stats", lambda stats: None)
    return benchmark


def test_what_is_written_down(enabled):
    case = work.Case("frozen_linear", "t5", 6, "float32", "cpu", "small", rounds=3)
    counted = counts.frozen_linear(6, 4, 8, 4, dbias=True)
    measure.measure(enabled, case, "ours", work.differentiated(linear), inputs, counted, linear)
    assert enabled.group == "frozen_linear t5 small 6 tokens float32"
    assert enabled.extra_info == {
        "op": "frozen_linear",
        "shape": "t5",
        "case": "small",
        "dtype": "float32",
        "tokens": 6,
        "implementation": "ours",
        "flops": counted.flops,
        "bytes": counted.bytes,
        "launches": 2,
        "peak_bytes": None,
    }


class Event:
    """Of a device that is as far as ``reached`` says when the host asks; a round takes it 2 ms."""

    reached = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def query(self):
        return self.reached

    def elapsed_time(self, stop):
        return 2.0


@pytest.fixture
def card(monkeypatch):
    """torch.cuda as ``device_seconds`` uses it; returns the cycles that the device slept."""
    slept = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    return slept


def test_the_device_is_timed_in_a_queue_that_is_filled_ahead(card, monkeypatch):
    monkeypatch.setattr(clock, "busy_seconds", None)
    runs = []
    seconds, walls = clock.device_seconds(lambda: runs.append(0), 15)
    assert seconds == [2e-3] * 15 and len(walls) == 5 and len(runs) == 3 + 5 + 15 and len(card) == 15


def test_the_queue_is_ahead_by_what_the_host_takes_and_not_the_device(card, monkeypatch):
    """Or a loss of 85 ms, of which the host takes one, would be timed for three times as long."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.02))
    _, walls = clock.device_seconds(lambda: None, 5)
    assert min(walls) >= 0.02 and max(card) < 2.5e9 * 0.01


def test_what_no_queue_holds_is_timed_by_the_profiler(card, monkeypatch):
    monkeypatch.setattr(Event, "reached", True)
    monkeypatch.setattr(clock, "busy_seconds", lambda run, rounds: [7.0] * rounds)
    seconds, _ = clock.device_seconds(lambda: None, 5)
    assert seconds == [7.0] * 5 and len(card) == 2  # two late rounds of five are enough


def test_seconds_in_which_the_device_is_busy(card, monkeypatch):
    """Kernels of two streams that overlap count once, what the host does not at all."""

    class Profile:
        def __init__(self, activities):
            pass

        __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)

        def events(self):
            spans = [(0.0, 10.0, "CUDA"), (5.0, 20.0, "CUDA"), (30.0, 31.0, "CUDA"), (0.0, 99.0, "CPU")]
            kinds = torch.autograd.DeviceType
            return [
                SimpleNamespace(device_type=getattr(kinds, kind), time_range=SimpleNamespace(start=start, end=end))
                for start, end, kind in spans
            ]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert clock.busy_seconds(lambda: None, 2) == [pytest.approx(21e-6)] * 2


def test_times_of_the_device_become_the_benchmarks_rounds(enabled, monkeypatch):
    """As on CUDA: the rounds have run, and their seconds are handed to the fixture."""
    seconds = [1.0, 2.0, 4.0]
    monkeypatch.setattr(clock, "device_seconds", lambda run, rounds: (seconds, [5.0, 9.0, 5.0]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    case = work.Case("frozen_linear", "t5", 6, "bfloat16", "cuda", rounds=3)
    measure.record(enabled, case, "ours", lambda: None, counts.frozen_linear(6, 4, 8, 2))
    assert enabled.stats.stats.data == seconds
    assert enabled.extra_info["wall_seconds"] == 5.0 and enabled.extra_info["wall_samples"] == [5.0, 9.0, 5.0]
    assert enabled.extra_info["predicted_seconds"] == pytest.approx(6e-6, rel=0.01)


def test_limits_of_attention_and_the_loss_are_counted(monkeypatch):
    """The limit of each is counted by what it alone does."""
    counted = {}
    monkeypatch.setattr(bench_attention, "measure", lambda *given: counted.update(attention=given[5]))
    bench_attention.test_attention(None, "nllb-600m", "bfloat16", 0.0, "limit", "cpu")
    monkeypatch.setattr(bench_linear_cross_entropy, "record", lambda *given: counted.update(loss=given[4]))
    monkeypatch.setattr(bench_linear_cross_entropy, "inputs", lambda *given: small_loss())
    monkeypatch.setattr(bench_linear_cross_entropy, "copies", lambda make, device: [make()])
    bench_linear_cross_entropy.test_linear_cross_entropy(None, "m2m-418m", "bfloat16", 0.1, "limit", "cpu")
    assert [part.name for part in counted["attention"].kernels] == ["library pass"] * 2
    assert counted["loss"].flops == 4 * 512 * 1024 * 128112


def small_loss() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(4, 8, requires_grad=True), torch.randn(16, 8), torch.randint(0, 16, (4,))
