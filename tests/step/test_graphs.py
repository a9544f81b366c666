from __future__ import annotations

import pytest
import torch
from fake_graphs import Recorder

from petl_kernels.step import graphs
from petl_kernels.step.graphs import CudaGraphs, Graphed, row_sentences, row_tokens


@pytest.fixture
def weight():
    weight = torch.nn.Parameter(torch.arange(4.0))
    weight.grad = torch.zeros(4)
    return weight


def step_of(weight):
    def run(x, scale):
        loss = (x * weight).square().sum() * scale
        loss.backward()
        return loss

    return run


def warm(step: Graphed, weight: torch.nn.Parameter) -> Graphed:
    """Returns it after its first call, which is not captured."""
    step(torch.ones(7, 4, device=weight.device), torch.ones((), device=weight.device))
    weight.grad.zero_()
    return step


def test_replays_give_losses_and_gradients(weight):
    recorder = Recorder()
    step, place = warm(Graphed(step_of(weight), recorder), weight), weight.grad.data_ptr()
    losses, expected, gradient = [], [], torch.zeros(4)
    for rows in (2, 3, 2, 2, 3):
        x, scale = torch.randn(rows, 4), torch.rand(())
        losses.append(step(x, scale))
        inner = (x * weight.detach()).square().sum() * scale
        expected.append(inner)
        gradient += 2 * scale * (x.square() * weight.detach()).sum(0)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    torch.testing.assert_close(weight.grad, gradient)
    assert (recorder.captures, recorder.replays, len(step)) == (2, 5, 2)
    assert weight.grad.data_ptr() == place


def test_the_first_call_is_not_captured(weight):
    recorder = Recorder()
    step = Graphed(step_of(weight), recorder)
    for captured in (0, 1, 1):
        step(torch.ones(1, 4), torch.ones(()))
        assert recorder.captures == captured
    assert weight.grad.tolist() == [0, 6, 12, 18]


def test_after_a_capture_that_failed_all_run_as_they_are(weight):
    recorder = Recorder(failures=1)
    step = warm(Graphed(step_of(weight), recorder), weight)
    for rows in (1, 1, 2):
        step(torch.ones(rows, 4), torch.ones(()))
    step.forget()
    step(torch.ones(1, 4), torch.ones(()))
    assert recorder.captures == 0 and weight.grad.tolist() == [0, 10, 20, 30]
    assert recorder.reason == "operation not permitted when stream is capturing"
    other = warm(Graphed(step_of(weight), recorder), weight)
    other(torch.ones(1, 4), torch.ones(()))
    assert recorder.captures == 0 and len(other) == 0 and recorder.releases == 1


@pytest.mark.parametrize("error", [ValueError, AssertionError])
def test_whatever_a_capture_fails_with(weight, error):
    recorder = Recorder(failures=1, error=error)
    step = warm(Graphed(step_of(weight), recorder), weight)
    step(torch.ones(1, 4), torch.ones(()))
    assert recorder.reason and weight.grad.tolist() == [0, 2, 4, 6]


def test_a_first_call_that_fails_is_no_first_call(weight):
    """A smaller one comes next, whose kernels are unchecked too."""
    recorder, failing = Recorder(), [True]

    def run(x, scale):
        if failing and failing.pop():
            raise torch.OutOfMemoryError
        return step_of(weight)(x, scale)

    step = Graphed(run, recorder)
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.ones(2, 4), torch.ones(()))
    for captures in (0, 1):
        step(torch.ones(1, 4), torch.ones(()))
        assert recorder.captures == captures


def test_out_of_memory_is_the_caller_s(weight):
    step = warm(Graphed(step_of(weight), Recorder(failures=1, error=torch.OutOfMemoryError)), weight)
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.ones(1, 4), torch.ones(()))
    assert not weight.grad.any() and len(step) == 0


def test_no_more_than_the_most(weight, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    recorder = Recorder()
    step = warm(Graphed(step_of(weight), recorder), weight)
    for rows in (1, 2, 3, 3):
        step(torch.ones(rows, 4), torch.ones(()))
    assert (recorder.captures, recorder.replays) == (2, 2)
    assert weight.grad.tolist() == [0, 18, 36, 54]


def test_release(weight):
    """The next call then runs without a capture."""
    recorder = Recorder()
    step = warm(Graphed(step_of(weight), recorder), weight)
    for _ in range(2):
        step(torch.ones(1, 4), torch.ones(()))
        step(torch.ones(1, 4), torch.ones(()))
        recorder.release()
    assert (recorder.captures, recorder.replays, len(step)) == (2, 3, 0)


@pytest.mark.parametrize("most", [1, 100, 128, 1000, 4096, 8190])
def test_rows_have_few_shapes(most):
    """Rows have at most 8 lengths, an eighth of the longest apart, or the smallest step."""
    sizes = [row_tokens(count, most) for count in range(1, most + 1)]
    assert all(count <= size <= most for count, size in enumerate(sizes, 1)) and len(set(sizes)) <= 8
    assert max(size - count for count, size in enumerate(sizes, 1)) < max(128, -(-most // 8) + 128)
    assert row_tokens(most + 1, most) > most  # one sentence
    for tokens in set(sizes):
        found = {row_sentences(count, tokens) for count in range(1, tokens + 1)}
        assert len(found) <= 2 and max(found) == tokens


def test_bytes_beside_a_step():
    """They are the inputs of each shape that rows of 8,192 tokens can have, and cuBLAS' workspace."""
    a_shape = 3 * 8 * 8192 + 2 * 4 * 8193 + 2 * 512
    assert graphs.graph_bytes(8192) == 32 * 2**20 + 64 * a_shape
    assert graphs.graph_bytes(128) == 32 * 2**20 + 2 * (3 * 8 * 128 + 2 * 4 * 129 + 2 * 512)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_card():
    weight = torch.nn.Parameter(torch.arange(4.0, device="cuda"))
    weight.grad = torch.zeros_like(weight)
    run = step_of(weight)
    recorder = CudaGraphs(weight.device)
    step = warm(Graphed(run, recorder), weight)
    inputs = [(torch.randn(rows, 4, device="cuda"), torch.rand((), device="cuda")) for rows in (2, 3, 2, 2, 3)]
    losses = [step(*given) for given in inputs]
    gradient, weight.grad = weight.grad, torch.zeros_like(weight)
    torch.testing.assert_close(torch.stack(losses), torch.stack([run(*given).detach() for given in inputs]))
    torch.testing.assert_close(gradient, weight.grad)
    assert len(step) == 2 and recorder.reason == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_capture_that_waits_on_the_card():
    """It ends with an error, after which memory, streams and random numbers are as before."""
    device, waited = torch.device("cuda", 0), []

    def run(x):
        y = (torch.rand(4, device=device) * x).sum()
        if torch.cuda.is_current_stream_capturing():
            waited.append(y.item())
        return y

    recorder, stream = CudaGraphs(device), torch.cuda.current_stream().cuda_stream
    step = Graphed(run, recorder)
    torch.manual_seed(3)
    found = [step(torch.ones(4, device=device)) for _ in range(3)]
    assert recorder.reason and not waited and len(step) == 0
    assert torch.cuda.current_stream().cuda_stream == stream
    torch.cuda.empty_cache()
    torch.manual_seed(3)
    expected = [run(torch.ones(4, device=device)) for _ in range(3)]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
