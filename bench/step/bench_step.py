"""A training step of NLLB-600M's shape with LoRA on q and v: ours ("ours" is bf16, tier 1), beside PEFT.

Random weights, 12 layers a side, 256,206 words, dropout 0.1 as the checkpoints have it. A step is the loss of
model(labels=...), and the gradients of the adapters. The frozen weights are made once for a dtype on the device, and
all implementations train adapters beside the same ones. Two kinds of text:

- equal lengths: 4 x 128 source and as many target tokens on a CPU, 64 x 128 on a GPU;
- real lengths (``sentences``): some batches of like lengths, at even distances over all of them, are one sample. PEFT
  has them as padded rows with masks, ours as packed rows: the same sentences, so the same work.

On a GPU "ours, graph" is a step as the trainer takes it: packed rows, filled up to few shapes, captured as CUDA graphs.

On a CPU one step of each implementation is taken in turn, and ratios are medians over these rounds. A CPU without
instructions for bf16 has shorter batches, and PEFT's faster setting there is fp32: it stands beside ours in both
dtypes. PEFT's step in bf16 takes such a CPU seconds a token: equal lengths have 4 tokens for it, once.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from petl_mt.data import Batch

import petl_kernels as pk
from bench.predict import counts
from bench.random_model import frozen_model, random_weights
from bench.run import clock, turns
from bench.run.measure import describe, record
from bench.run.peers import lora_by_peft
from bench.run.work import Case
from bench.shapes import MODELS, m2m_config
from bench.step.sentences import FIRST_WORD, PAD, Data, batches, packed, packed_batches
from petl_kernels.step.graphs import CudaGraphs, Graphed

NAME = "nllb-600m"
SHAPE = MODELS[NAME]
WORDS = SHAPE[-1]


def with_tier(model, tier: int):
    return pk.lean(pk.adapt(model, pk.LoRA(rank=16, alpha=32.0)), tier)


# Those that decide most come first: time may run out.
IMPLEMENTATIONS = {
    "ours": lambda model: with_tier(model, 1),
    "ours, graph": lambda model: with_tier(model, 1),
    "PEFT, bf16 adapters": lambda model: lora_by_peft(model, False),
    "PEFT, defaults": lambda model: lora_by_peft(model, True),
    "ours, fp32": lambda model: with_tier(model, 1),
    "PEFT, fp32": lambda model: lora_by_peft(model, True),
    "ours, tier 2": lambda model: with_tier(model, 2),
    "ours, tier 3": lambda model: with_tier(model, 3),
}
PEERS = tuple(name for name in IMPLEMENTATIONS if name.startswith("PEFT"))
FP32 = tuple(name for name in IMPLEMENTATIONS if name.endswith("fp32"))
GRAPH = "ours, graph"
CARD = tuple(name for name in IMPLEMENTATIONS if name not in FP32)
BF16 = tuple(name for name in CARD if name != GRAPH)
QUICK = tuple(name for name in BF16 if name not in PEERS)
QUICK = (QUICK[0], *FP32, *QUICK[1:])  # of a CPU without instructions for bf16


@dataclass(frozen=True)
class Text:
    """Holds what a step reads: rows x length tokens a side, or ``data``'s batches. rounds, warm: those of a CPU."""

    implementations: tuple[str, ...]
    rounds: int
    warm: int = 1
    rows: int = 0
    length: int = 128
    data: Data | None = None

    @property
    def case(self) -> str:
        return "real lengths" if self.data else "equal lengths"

    @functools.cached_property
    def batches(self) -> list[Batch]:
        """Padded, on the host."""
        if self.data:
            return batches(self.data, WORDS)
        source, labels = (torch.randint(FIRST_WORD, WORDS, (self.rows, self.length)) for _ in range(2))
        return [Batch.of(source, labels, np.arange(self.rows), PAD)]

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of the source and of the target, without padding."""
        return sum(int((b.source != PAD).sum()) for b in self.batches), sum(b.target_tokens for b in self.batches)

    def inputs(self, implementation: str, device: str) -> list[dict]:
        """Returns the model's inputs for each batch of a step."""
        place = torch.device(device)
        if implementation == GRAPH:
            rows = packed_batches(self.data, WORDS) if self.data else map(packed, self.batches)
            most = self.data.batch_tokens if self.data else self.rows * self.length
            return [row.filled(most).to(place).row for row in rows]
        if self.data and implementation not in PEERS:
            return [batch.to(place).row for batch in packed_batches(self.data, WORDS)]
        return [padded(batch.to(place)) for batch in self.batches]


def padded(batch: Batch) -> dict:
    mask = (batch.source != PAD).long()
    return {"input_ids": batch.source, "attention_mask": mask, "labels": batch.labels, "use_cache": False}


def texts(device: str) -> dict[str, list[Text]]:
    """Returns the texts by the function that times them."""
    if device == "cuda":
        real = Data(8192, 256, updates=4, multiple=8)
        return {"test_step": [Text(CARD, 3, rows=64)], "test_real_lengths": [Text(CARD[:4], 3, data=real)]}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        real = Data(512, 128, updates=3)
        return {"test_step": [Text(BF16, 5, rows=4)], "test_real_lengths": [Text(BF16[:3], 5, data=real)]}
    real = Data(192, 128, updates=3)
    return {
        "test_step": [Text(QUICK, 3, rows=4, length=64)],
        "test_real_lengths": [Text(QUICK[:3], 3, data=real)],
        "test_few_tokens": [Text(BF16[:3], 1, warm=0, rows=1, length=4)],
    }


def pytest_generate_tests(metafunc) -> None:
    found = texts(metafunc.config.getoption("--device")).get(metafunc.function.__name__, [])
    marks = {name: pytest.mark.peer for name in PEERS}
    given = [
        pytest.param(text, name, marks=marks.get(name, ()), id=name) for text in found for name in text.implementations
    ]
    metafunc.parametrize(("text", "implementation"), given)


@pytest.fixture(scope="module")
def make(device):
    """name of an implementation -> its model. The weights of each dtype are there once, for all models."""
    bf16 = functools.cache(lambda: random_weights(m2m_config(*SHAPE), device))
    fp32 = functools.cache(lambda: {name: weight.float() for name, weight in bf16().items()})

    def made(name: str) -> torch.nn.Module:
        gc.collect()  # modules refer to one another: adapters and gradients of the last ones are still there
        torch.manual_seed(0)
        return IMPLEMENTATIONS[name](frozen_model(m2m_config(*SHAPE), (fp32 if name in FP32 else bf16)())).train()

    return made


@pytest.fixture(scope="module")
def in_turn(request, make, device):
    """text -> the seconds of each implementation that this run is to time."""

    @functools.cache
    def seconds(text: Text) -> dict[str, list[float]]:
        wanted = [item.callspec.params for item in request.session.items if not item.get_closest_marker("skip")]
        names = [params["implementation"] for params in wanted if params.get("text") == text]
        steps = {name: step_of(make(name), text.inputs(name, device)) for name in names}
        return turns.seconds_in_turn(steps, text.rounds, text.warm, device)

    return seconds


def test_step(benchmark, text, implementation, device, make, in_turn):
    time_step(benchmark, text, implementation, device, make, in_turn)


def test_real_lengths(benchmark, text, implementation, device, make, in_turn):
    time_step(benchmark, text, implementation, device, make, in_turn)


def test_few_tokens(benchmark, text, implementation, device, make, in_turn):
    """Runs where products in bf16 are slow."""
    time_step(benchmark, text, implementation, device, make, in_turn)


def time_step(benchmark, text: Text, implementation: str, device: str, make, in_turn) -> None:
    layers, d, ffn, _, words = SHAPE
    counted = counts.step(layers, *text.tokens, d, ffn, words, torch.bfloat16.itemsize)
    dtype = "" if set(text.implementations) & set(FP32) else "bfloat16"  # of all that stand side by side
    case = Case("step", NAME, text.tokens[0], dtype, device, f"{text.case}, LoRA r=16", rounds=text.rounds)
    if device == "cuda":
        made = captured_step_of if implementation == GRAPH else step_of
        record(
            benchmark, case, implementation, made(make(implementation), text.inputs(implementation, device)), counted
        )
        return
    seconds = in_turn(text)
    describe(benchmark, case, implementation, counted)
    peers = {name: turns.ratio(seconds[implementation], seconds[name]) for name in seconds if name in PEERS}
    benchmark.extra_info["of_peers"] = peers
    if not dtype:
        benchmark.extra_info["bytes"] = None  # which differ, and there is no one roofline
    clock.write_down(benchmark, seconds[implementation])


def step_of(net: torch.nn.Module, inputs: list[dict]) -> Callable[[], None]:
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def step() -> None:
        for each in inputs:
            torch.autograd.grad(net(**each).loss, parameters)

    return step


def captured_step_of(net: torch.nn.Module, inputs: list[dict]) -> Callable[[], None]:
    """Returns the same on packed rows on a GPU, captured when a shape first comes."""
    for parameter in (own for own in net.parameters() if own.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    names = [name for name in inputs[0] if name != "longest"]
    longest = max(each["longest"] for each in inputs)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, tensors, strict=True))
        loss = net(**given, longest=longest, counted=given["labels"].numel()).loss
        loss.backward()
        return loss.detach()

    graphed = Graphed(run, CudaGraphs(inputs[0]["labels"].device))
    rows = [[each[name].as_subclass(torch.Tensor) for name in names] for each in inputs]

    def step() -> None:
        for tensors in rows:
            graphed(*tensors)

    return step
