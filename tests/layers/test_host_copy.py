"""Tier 5 with copies to host memory: the bookkeeping, with copies as late as they may be, and the same on a card."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import petl_kernels as pk
from petl_kernels.layers import recompute
from petl_kernels.layers.host_copy import Travels
from petl_kernels.layers.rule import layer as one_node
from petl_kernels.methods import METHODS

from .lean_cases import DROPOUT, adapted, ragged, step

HOLDERS = recompute, one_node  # the modules that hold a layer's input in host memory


class Copies:
    """``InputCopies`` on the CPU: in order, each made when it or a later one is waited for.

    Until then the target is NaN, and both ends have to stay alive.
    """

    def __init__(self):
        self.pinned_sizes, self.events, self.done = [], [], 0

    def pinned(self, size: int) -> torch.Tensor:
        self.pinned_sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def start(self, to: torch.Tensor, source: torch.Tensor) -> int:
        assert to.is_contiguous() and source.is_contiguous() and to.nbytes == source.nbytes
        self.events.append([(StorageWeakRef(end.untyped_storage()), end.data_ptr()) for end in (to, source)])
        self.events[-1].append(to.nbytes)
        ctypes.memset(to.data_ptr(), 0xFF, to.nbytes)
        return len(self.events)

    def wait(self, event: int) -> None:
        while self.done < event:
            (to, target), (source, start), size = self.events[self.done]
            assert not to.expired() and not source.expired(), "memory was freed before its copy"
            ctypes.memmove(target, start, size)
            self.done += 1


@pytest.fixture
def copies(monkeypatch) -> Copies:
    copies = Copies()
    travels = Travels(copies)
    for module in HOLDERS:
        monkeypatch.setattr(module, "host_copy", travels.out)
    return copies


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


FEW = ("lora", "adapter", "prefix", "full")
QUICK = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("method", QUICK)
def test_tier_5_is_tier_4_bit_for_bit(method, copies):
    for family in ("m2m100", "t5"):
        model = adapted(family, method, dtype=torch.float32, **(DROPOUT if family == "m2m100" else {}))
        inputs = ragged(model)
        expected = step(pk.lean(model, 4), inputs)
        for _ in range(2):
            assert_same(step(pk.lean(model, 5), inputs), expected)


def test_each_input_travels_out_once_and_back_once_through_the_same_buffers(copies):
    model = pk.lean(adapted("m2m100", "lora", dtype=torch.float32), 5)
    inputs = ragged(model)
    for k in range(1, 4):
        step(model, inputs)
        assert len(copies.events) == k * (4 + 3)  # the last layer's input is still there when backward starts
        assert len(copies.pinned_sizes) == 4  # of the first step


def test_buffers_grow_with_the_batch_and_are_never_more_than_the_layers(copies):
    model = pk.lean(adapted("m2m100", "lora", dtype=torch.float32), 5)
    for rows in (2, 9, 3, 9, 1):
        step(model, ragged(model, rows=rows))
    assert len(copies.pinned_sizes) == 8  # none after the largest batch has been seen


def test_one_input_is_on_the_device_beside_the_running_layers(copies):
    model = pk.lean(adapted("m2m100", "lora", dtype=torch.float32), 5)
    inputs = ragged(model)
    held, out = [], one_node.host_copy

    def counted(x):
        made = out(x)
        held.append(made)
        assert [own._x is not None for own in held] == [False] * (len(held) - 1) + [True]
        return made

    one_node.host_copy = counted  # the fixture puts the real one back
    loss = model(**inputs).loss
    get = type(held[0]).get

    def fetched(own):
        tensor = get(own)
        assert sum(other._x is not None for other in held) == (own is not held[0])
        return tensor

    for own in held:
        own.get = fetched.__get__(own)
    loss.backward()


def test_backward_twice_a_dropped_graph_and_two_graphs_at_once(copies):
    plain = pk.lean(adapted("m2m100", "lora", dtype=torch.float32), 4)
    other = pk.lean(copy.deepcopy(plain), 5)
    inputs = ragged(plain)
    for model in (plain, other):
        model.zero_grad()
        model(**inputs).loss.backward(retain_graph=True)
        kept = model(**inputs).loss
        kept.backward(retain_graph=True)
        del kept
        model(**inputs).loss  # noqa: B018  its gradient is never computed
        first, second = (model(**ragged(model, rows=rows)).loss for rows in (2, 4))
        first.backward()
        second.backward()
        model.gradient_checkpointing_enable()
        model(**inputs).loss.backward()
    for one, two in zip(pk.trainable_parameters(other), pk.trainable_parameters(plain), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_some_layers_only_and_autocast(copies):
    model = adapted("t5", "lora", dtype=torch.float32)
    inputs = ragged(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(pk.lean(model, [4, 4, 4, 1]), inputs)
        assert_same(step(pk.lean(model, [5, 4, 5, 1]), inputs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_card(method):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sizes = {"d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    model = adapted("m2m100", method, dtype=torch.float32, **sizes).cuda()
    small, large = ({name: value.cuda() for name, value in ragged(model, rows=rows).items()} for rows in (8, 256))
    for inputs in (large, small, large):
        expected = step(pk.lean(model, 4), inputs)
        for _ in range(2):
            assert_same(step(pk.lean(model, 5), inputs), expected)


@pytest.mark.gpu
def test_tier_5_keeps_one_input_on_the_card():
    """The last layer's input is on the card between forward and backward; a second step pins no memory."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sizes = {"d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "encoder_layers": 6}
    model = adapted("m2m100", "lora", dtype=torch.float32, **sizes).cuda()
    inputs = {name: value.cuda() for name, value in ragged(model, rows=512).items()}

    def kept(tier: int) -> int:
        pk.lean(model, tier)
        step(model, inputs)
        before = torch.cuda.memory_allocated()
        loss = model(**inputs).loss
        found = torch.cuda.memory_allocated() - before
        del loss
        return found

    one = inputs["input_ids"].numel() * 512 * 4
    assert kept(5) <= kept(4) - 5 * one
    step(model, inputs)
    allocations = torch.cuda.host_memory_stats()["num_host_alloc"]
    step(model, inputs)
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == allocations
