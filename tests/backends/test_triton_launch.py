"""The launches that leave out Triton's own way, against that way: the same kernel, started with the same arguments."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from rehearsal.driver import PlayedDriver, played, without_compiler  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from petl_kernels.backends.triton import launch as module  # noqa: E402

ROOT = Path(__file__).parents[2]
NUMBERS = (0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, -(2**31) - 16, 2**62)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.int8)
FACTOR = tl.constexpr(3)


def _kernel(a, b, seed, several, n, m, threshold, scale, MODE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(a, tl.load(b) * FACTOR)


@pytest.fixture(params=["extension", "triton"])
def key(request, monkeypatch):
    """Both ways to describe arguments: C++, and Triton's own function, which serves where there is no compiler."""
    if request.param == "triton":
        monkeypatch.setattr(module, "launch_key", module._key_by_triton)
    else:
        extension = pytest.importorskip("petl_kernels._C")
        monkeypatch.setattr(module, "launch_key", extension.launch_key)


@pytest.fixture
def card(monkeypatch) -> Iterator[PlayedDriver]:
    monkeypatch.setattr(module, "_prepared", {})
    with played() as driver, without_compiler():
        yield driver
        driver.starts.clear()
        module._prepared.clear()


@pytest.fixture
def by_triton(monkeypatch) -> Iterator[list]:
    """The launches that went Triton's way."""
    launches, through = [], module._launch_by_triton
    monkeypatch.setattr(module, "_launch_by_triton", lambda *given: launches.append(given) or through(*given))
    yield launches
    launches.clear()


def new_kernel() -> JITFunction:
    return JITFunction(_kernel, do_not_specialize=["threshold"])


def start(kernel, *args, grid=(5, 2), warps=4, stages=2, MODE="sum", BLOCK=64) -> None:
    module.launch(kernel, grid, *args, warps=warps, stages=stages, MODE=MODE, BLOCK=BLOCK)


def arguments(**changes) -> tuple:
    given = {"a": torch.zeros(8), "b": torch.zeros(8), "seed": None, "several": (1, 2), "n": 17, "m": 32}
    return tuple((given | {"threshold": 5, "scale": 0.5} | changes).values())


class Start(NamedTuple):
    compiled: str  # types, constants and what is known of the values
    options: tuple
    grid: tuple[int, int, int]
    stream: int
    told: list  # hooks
    bound: tuple  # the arguments, in the kernel's order

    def same(self, other: Start) -> bool:
        pairs = zip(self.bound, other.bound, strict=True)
        return self[:-1] == other[:-1] and all(a is b or (type(a) is type(b) and a == b) for a, b in pairs)


def only_start(driver) -> Start:
    """The one start since the last time."""
    [(source, (x, y, z, stream, _, options, _, enter, leave, *bound))] = driver.starts
    driver.starts.clear()
    told = [call for hook in (enter, leave) if hook is not None for call in hook.calls]
    compiled = str((source.signature, source.constants, source.attrs))
    return Start(compiled, options, (x, y, z), stream, told, tuple(bound))


def some_tensor(draw: random.Random) -> torch.Tensor:
    tensor = torch.empty(64, dtype=draw.choice(DTYPES))[draw.choice((0, 0, 0, 1, 2, 4, 16)) :]
    return torch.nn.Parameter(tensor, requires_grad=False) if draw.random() < 0.2 else tensor


def some_number(draw: random.Random):
    return draw.choice(NUMBERS) if draw.random() < 0.9 else draw.choice((0.0, 1.0, True, False, None))


def some_tuple(draw: random.Random) -> tuple:
    kind = draw.choice((some_tensor, some_number, some_tuple if draw.random() < 0.2 else some_number))
    return tuple(kind(draw) for _ in range(draw.randrange(4)))


def some_arguments(draw: random.Random) -> tuple:
    return (
        some_tensor(draw),
        some_tensor(draw),
        draw.choice((None, some_tensor(draw))),
        some_tuple(draw),
        some_number(draw),
        some_number(draw),
        draw.choice(NUMBERS),
        draw.choice((0.0, 1.0, 0.5, 16.0)),
    )


def some_options(draw: random.Random) -> dict:
    grid, warps = draw.choice(((3,), (3, 2), (3, 2, 4))), draw.choice((4, 8))
    return {"grid": grid, "warps": warps, "MODE": draw.choice(("sum", "max")), "BLOCK": draw.choice((16, 32))}


def start_twin(twin, *args, grid=(5, 2), warps=4, MODE="sum", BLOCK=64) -> None:
    """Does what `start` does, by Triton's own launch."""
    twin[grid](*args, MODE=MODE, BLOCK=BLOCK, num_warps=warps, num_stages=2, enable_fp_fusion=True)


def test_every_start_is_triton_s(card, key, by_triton):
    """500 lists of arguments, each twice and in any order: a twin that Triton launches is started the same way."""
    draw, ours, twin = random.Random(0), new_kernel(), new_kernel()
    calls = [(some_arguments(draw), some_options(draw)) for _ in range(500)]
    for args, options in draw.sample(calls * 2, 1000):
        start(ours, *args, **options)
        found = only_start(card)
        start_twin(twin, *args, **options)
        assert found.same(only_start(card)), (args, options)
    assert 100 < len(by_triton) == len(module._prepared) <= 500


def test_a_start_comes_from_the_cache(card, key, by_triton):
    """Other numbers and tensors of the same kind need no look at Triton; the same after that, of another kind, does."""
    kernel = new_kernel()
    for n, threshold, scale in ((17, 5, 0.5), (33, -7, 1.0), (2**31 - 1, 5, 16.0)):
        start(kernel, *arguments(a=torch.ones(16), n=n, threshold=threshold, scale=scale), grid=(n % 5 + 1,))
    assert len(by_triton) == 1 and len(card.starts) == 3
    start(kernel, *arguments(n=16))
    assert len(by_triton) == 2


DIFFERENT = {
    "alignment": [{"a": torch.zeros(8)[i:]} for i in (0, 1)],
    "dtype": [{"b": torch.zeros(8, dtype=dtype)} for dtype in DTYPES],
    "absent": [{"seed": None}, {"seed": torch.zeros(1, dtype=torch.int64)}],
    "number": [{"n": n} for n in (1, 16, 17, 2**31, 2**31 + 1)],
    "kind of number": [{"n": n} for n in (1, 1.0, True, None)],
    "length of a tuple": [{"several": (2,) * length} for length in range(4)],
    "depth of a tuple": [{"several": several} for several in ((2, 3), (2, (3,)), ((2, 3),), ((2,), 3))],
    "items of a tuple": [{"several": (item, 2)} for item in (1, 16, 2, 2.0, None, torch.zeros(4), torch.zeros(4)[1:])],
    "constant": [{"MODE": mode} for mode in ("sum", "max")],
    "warps": [{"warps": warps} for warps in (1, 4, 8)],
    "stages": [{"stages": stages} for stages in (1, 2)],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_has_an_entry_of_its_own(card, key, name):
    kernel = new_kernel()
    for _ in range(2):
        for changes in DIFFERENT[name]:
            options = {option: changes[option] for option in ("MODE", "warps", "stages") if option in changes}
            start(kernel, *arguments(**{k: v for k, v in changes.items() if k not in options}), **options)
    assert len(module._prepared) == len(DIFFERENT[name])


def test_another_kernel_and_another_device_have_entries_of_their_own(card, key):
    for kernel in (new_kernel(), new_kernel()):
        for card.device in (0, 1):
            start(kernel, *arguments())
    assert len(module._prepared) == 4


def test_the_stream_is_that_of_the_launch(card, key):
    kernel = new_kernel()
    streams = []
    for card.stream in (7, 7, 11, 0):
        start(kernel, *arguments())
        streams.append(only_start(card).stream)
    assert streams == [7, 7, 11, 0]


def test_no_tensor_is_kept(card, key):
    kernel, tensors = new_kernel(), [torch.zeros(8) for _ in range(3)]
    for _ in range(2):
        start(kernel, *arguments(a=tensors[0], seed=tensors[1], several=(tensors[2], 3)))
    card.starts.clear()
    gone = [weakref.ref(tensor) for tensor in tensors]
    tensors.clear()
    gc.collect()
    assert module._prepared and [reference() for reference in gone] == [None] * 3


class Subclass(torch.Tensor):
    pass


def test_unfamiliar_arguments_go_triton_s_way(card, key, by_triton):
    """A subclass may have a data_ptr of its own; numbers over 64 bits are refused by Triton."""
    if module.launch_key is module._key_by_triton:
        pytest.skip("Triton's own function describes every argument that Triton takes")
    kernel = new_kernel()
    for _ in range(2):
        start(kernel, *arguments(a=torch.zeros(8).as_subclass(Subclass)))
        start(kernel, *arguments(several=(2, tl.constexpr(3))))
        start(kernel, *arguments(n=2**63))
    assert len(by_triton) == len(card.starts) == 6 and not module._prepared


def test_arguments_by_name_and_constants_by_place_go_triton_s_way(card, key, by_triton):
    kernel, given = new_kernel(), arguments()
    for _ in range(2):
        module.launch(kernel, (1,), *given[:-1], scale=given[-1], warps=4, stages=2, MODE="sum", BLOCK=64)
        module.launch(kernel, (1,), *given, "sum", 64, warps=4, stages=2)
        module.launch(kernel, (1,), *given, warps=4, stages=2, MODE="sum", BLOCK=64, num_ctas=2)
    assert len(by_triton) == len(card.starts) == 6 and not module._prepared


@pytest.mark.parametrize("what", ["before", "after", "run", "debug", "stages", "instrumented", "version", "no chain"])
def test_whoever_watches_launches_sees_them(card, key, by_triton, monkeypatch, what):
    kernel = new_kernel()
    start(kernel, *arguments())
    told = []
    if what in ("before", "after"):
        hook = knobs.runtime.launch_enter_hook if what == "before" else knobs.runtime.launch_exit_hook
        monkeypatch.setattr(hook, "calls", [told.append])
    elif what == "no chain":
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", None)
    elif what == "run":
        kernel.add_pre_run_hook(lambda *args, **options: told.append(args))
    elif what == "debug":
        monkeypatch.setattr(knobs.runtime, "debug", True)
    elif what == "stages":
        monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *given: ("key", "hash"))
    elif what == "instrumented":
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "none")
    else:
        monkeypatch.setattr(module, "_is_compared", False)
    for _ in range(2):
        start(kernel, *arguments())
    assert len(by_triton) == len(card.starts) == 3
    assert len(told) == (2 if what == "run" else 0)
    assert [len(args[8].calls) for _, args in card.starts[1:]] == ([0, 0] if what != "after" else [1, 1])


def test_a_changed_global_is_refused_as_triton_does(card, key, monkeypatch):
    kernel = new_kernel()
    for _ in range(2):
        start(kernel, *arguments())
    monkeypatch.setitem(globals(), "FACTOR", tl.constexpr(4))
    with pytest.raises(RuntimeError, match="FACTOR has changed"):
        start(kernel, *arguments())


def test_the_interpreter_goes_its_own_way(key):
    class Interpreted:
        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((grid, args, options))

    calls, tensor = [], torch.zeros(4)
    module.launch(Interpreted(), (3,), tensor, 5, warps=4, stages=2, BLOCK=16)
    options = {"BLOCK": 16, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert calls == [((3,), (tensor, 5), options)]


@pytest.mark.slow
def test_the_package_s_own_launches_come_from_the_cache():
    """In a process of its own: in this one the kernels may be the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("triton_launches.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 60
