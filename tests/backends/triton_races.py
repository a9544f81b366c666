"""Find data races in the code that Triton makes of a kernel, without running it.

Triton copies the tiles of coming steps of a loop into a ring of buffers in shared memory while the products of earlier
steps run. The rule, on every card:

    1. Nothing is written where a product that may still be running reads, or, in tensor memory, adds up.
    2. Nothing is read from shared memory before the wait for the copy that fills it.

Which products may still be running differs:

- sm_90: `ttng.warp_group_dot` (wgmma) only starts a product, which reads its operands in shared memory later;
  `ttng.warp_group_dot_wait` with `pendings = n` leaves the last n running. Triton gives a load that feeds a wgmma one
  buffer more than the steps it is copied ahead, but not where anything else uses the load as well: then the copy for a
  later step lands in the tile that the product before still reads, and the result depends on the timing.
- sm_100: `ttng.tc_gen5_mma` starts a product, too, with its sum in tensor memory; it signals an mbarrier when it and
  all before it have finished, and nothing but `ttng.wait_barrier` for that signal ends it.
- sm_80, and fp32 anywhere: operands are loaded into registers (`ttg.local_load`) in program order with the copies, and
  `mma.sync` or plain arithmetic takes them from there. No product is ever left running, so rule 1 cannot be broken;
  rule 2 can, by a ring that is too short or an `ttg.async_wait` that leaves too many copies under way.
- sm_75: no copy runs ahead and no product is left running: a tile is stored, and then loaded, by the program itself.

The audit runs the TTGIR with the integers in it (buffer indices, phases, constants) and keeps a list of the products
that may be running and of the copies that may be under way. What depends on an argument of the kernel is unknown until
a loop ends at it, which then makes STEPS steps. Of a branch with an unknown condition each side is looked at, and the
first taken as the one that ran, since Triton puts the end of a pipelined loop there; a product with an unknown
condition runs. Masks count for nothing, as a masked copy writes zeros. Barriers between the warps of a block come after
TTGIR and are not looked at.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

# Rings have up to 4 buffers, barriers 2 phases: after 12 steps every pair of indices has met.
STEPS = 16
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
ARITHMETIC = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "xori": operator.xor,
    "andi": operator.and_,
    "cmpi eq": operator.eq,
    "cmpi ne": operator.ne,
    "cmpi slt": operator.lt,
    "cmpi sle": operator.le,
    "cmpi sgt": operator.gt,
    "cmpi sge": operator.ge,
}
VIEWS = {"ttg.memdesc_trans", "ttg.memdesc_subslice", "ttg.memdesc_reshape", "ttg.memdesc_reinterpret"}
HARMLESS = {"ttg.convert_layout", "ttng.fence_async_shared", "ttng.inval_barrier", "ttg.barrier", "gpu.barrier"}


class Audit(NamedTuple):
    races: list[str]  # one sentence each
    reads: int  # operations that read a tile copied ahead
    overlaps: int  # copies that were started while a product may have been running


class Buffer(NamedTuple):
    ring: str
    index: int | None = None  # None: the whole ring

    def meets(self, other: Buffer) -> bool:
        return self.ring == other.ring and (None in (self.index, other.index) or self.index == other.index)


class Unknown(NamedTuple):
    """The integer that an operation would give, and a known number."""

    name: str
    plus: int = 0


class Operation(NamedTuple):
    name: str
    results: list[str]
    operands: list[str]
    text: str
    regions: list[list[Operation]]


Value = int | Buffer | Unknown


class Product(NamedTuple):
    name: str
    reads: list[Buffer]
    writes: list[Buffer]
    signal: tuple[Buffer, int] | None = None  # the barrier it signals when it ends, and which of its signals that is


@dataclass
class State:
    values: dict[str, Value] = field(default_factory=dict)
    settled: dict[str, int] = field(default_factory=dict)  # numbers that were chosen for unknown ones
    running: list[Product] = field(default_factory=list)
    started: list[Buffer] = field(default_factory=list)  # copies in no group yet
    under_way: list[list[Buffer]] = field(default_factory=list)  # groups of copies
    signals: dict[Buffer, int] = field(default_factory=lambda: defaultdict(int))  # how many each barrier will get
    waited: dict[Buffer, int] = field(default_factory=lambda: defaultdict(int))  # how many have come for certain


def audit(ttgir: str) -> Audit:
    """Returns what breaks the rule in a kernel's TTGIR; raises ValueError for an unknown operation on buffers."""
    run = _Run()
    run.block(_parse(iter(ttgir.splitlines()))[0])
    return Audit(sorted(run.races), len(run.reads), len(run.overlaps))


def _parse(lines: Iterator[str]) -> tuple[list[Operation], str]:
    """The operations of a region, and the line that ends it."""
    block = []
    for line in lines:
        line = re.sub(r" loc\([^()]*\)$", "", line.strip())
        if line.startswith("}"):
            return block, line
        if not line or line.startswith(("#", "^")):
            continue
        match = re.fullmatch(r"(?:(%[^=]+) = )?\"?([\w.]+)\"?(.*)", line)
        if match is None:
            raise ValueError(f"a line that the audit cannot read: {line}")
        results, name, text = match.groups()
        regions, end = [], line
        while end.endswith("{"):  # "} else {" ends a region and begins the next
            region, end = _parse(lines)
            regions.append(region)
        block.append(Operation(name, _names(results), NAME.findall(text), text, regions))
    return block, ""


def _names(results: str | None) -> list[str]:
    """Returns %a, %b#0 and %b#1 for `%a, %b:2`."""
    names = []
    for group in results.split(", ") if results else []:
        name, _, count = group.partition(":")
        names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    return names


class _Run:
    def __init__(self):
        self.state = State()
        self.races: set[str] = set()
        self.reads: set[str] = set()
        self.overlaps: set[str] = set()
        self.copied: set[str] = set()

    def block(self, operations: list[Operation]) -> list[Value]:
        """Runs the operations, and returns what the last one yields."""
        for operation in operations:
            if operation.name == "scf.yield":
                return [self.value(name) for name in operation.operands]
            values = self.results(operation)
            self.bind(operation.results, values or [Unknown(name) for name in operation.results])
        return []

    def results(self, op: Operation) -> list[Value]:
        """Runs one operation: what its results are, as far as that is known."""
        match op.name:
            case "module" | "tt.func":
                self.block(op.regions[0])
            case "scf.for":
                return self.loop(op)
            case "scf.if":
                return self.branch(op)
            case "ttg.local_alloc" | "ttng.tmem_alloc":
                if op.operands:  # the buffer's first content
                    self.write(op, Buffer(op.results[0]))
                return [Buffer(op.results[0])]
            case "ttg.memdesc_index":
                ring, index = self.buffer(op.operands[0]), self.value(op.operands[1])
                if not isinstance(index, int):
                    raise ValueError(f"the audit cannot tell which buffer of {ring.ring} this is: {op.text}")
                return [Buffer(ring.ring, index)]
            case view if view in VIEWS:
                return [self.buffer(op.operands[0])]
            case "ttg.async_copy_global_to_local":
                self.start_copy(op, self.buffer(op.operands[1]))
            case "ttg.async_commit_group":
                self.state.under_way.append(self.state.started)
                self.state.started = []
            case "ttg.async_wait":
                self.state.under_way = _last(self.state.under_way, _attribute(op, "num"))
            case "ttg.local_load":
                self.read(op, [self.buffer(op.operands[0])])
            case "ttg.local_store":
                self.write(op, self.buffer(op.operands[1]))
            case "ttg.local_dealloc":  # what comes next may get its memory
                self.write(op, self.buffer(op.operands[0]))
            case "ttng.warp_group_dot":
                operands = self.buffers(op.operands[:2])
                self.read(op, operands)
                self.state.running.append(Product(op.results[0], operands, []))
                if "isAsync = true" not in op.text:
                    self.state.running = []
            case "ttng.warp_group_dot_wait":
                self.state.running = _last(self.state.running, _attribute(op, "pendings"))
                return [self.value(name) for name in op.operands]
            case "ttng.tc_gen5_mma":
                self.start_tensor_memory_product(op)
            case "ttng.init_barrier":
                if ", 1 :" not in op.text:
                    raise ValueError(f"the audit knows no barrier that takes more than one signal: {op.text}")
                barrier = self.buffer(op.operands[0])
                self.state.signals[barrier] = self.state.waited[barrier] = 0
            case "ttng.wait_barrier":
                self.wait_barrier(op)
            case "ttng.tmem_load":
                self.read_sum(op, self.buffer(op.operands[0]))
            case "ttng.tmem_store":
                self.write(op, self.buffer(op.operands[1]))
            case _:
                dialect = op.name.split(".")[0]
                if dialect == "arith":
                    return [self.arithmetic(op)]
                if (dialect not in ("tt", "math") and op.name not in HARMLESS) or op.name == "tt.call":
                    raise ValueError(f"the audit does not know {op.name}")
        return []

    def value(self, name: str) -> Value:
        value = self.state.values.get(name, Unknown(name))
        if isinstance(value, Unknown) and value.name in self.state.settled:
            return self.state.settled[value.name] + value.plus
        return value

    def settle(self, name: str, number: int) -> int:
        """The value of `name`, which is `number` if it is unknown."""
        value = self.value(name)
        if isinstance(value, Unknown):
            self.state.settled[value.name] = number - value.plus
        return self.value(name)

    def buffer(self, name: str) -> Buffer:
        value = self.value(name)
        if not isinstance(value, Buffer):
            raise ValueError(f"the audit cannot tell which buffer {name} is")
        return value

    def buffers(self, names: list[str]) -> list[Buffer]:
        """Returns the operands that are in memory; the others are in registers."""
        return [value for value in map(self.value, names) if isinstance(value, Buffer)]

    def bind(self, names: list[str], values: list[Value]) -> None:
        self.state.values.update(zip(names, values, strict=True))

    def loop(self, op: Operation) -> list[Value]:
        header = op.text.split("->")[0]
        counter, begin, end, step = NAME.findall(header)[:4]
        pairs = NAME.findall(header)[4:]  # iter_args(%carried = %initial, ...)
        carried, values = pairs[::2], [self.value(name) for name in pairs[1::2]]
        begin, step = self.settle(begin, 0), self.settle(step, 1)
        counts = range(begin, self.settle(end, begin + STEPS * step), step)
        if len(counts) < 4 and any(inner.name == "ttg.async_copy_global_to_local" for inner in op.regions[0]):
            raise ValueError(f"the audit cannot judge a pipelined loop of so few steps: {op.text}")
        for number in counts:
            self.bind([counter, *carried], [number, *values])
            values = self.block(op.regions[0])
        return values

    def branch(self, op: Operation) -> list[Value]:
        condition = self.value(op.operands[0])
        if isinstance(condition, int):
            chosen = op.regions[:1] if condition else op.regions[1:]
            return self.block(chosen[0]) if chosen else []
        before = copy.deepcopy(self.state)
        for other in op.regions[1:]:
            self.block(other)
        self.state = before
        return self.block(op.regions[0])

    def arithmetic(self, op: Operation) -> Value:
        kind = op.name.removeprefix("arith.")
        values = [self.value(name) for name in op.operands]
        if kind == "constant":
            number = re.fullmatch(r" (true|false|-?\d+)(?: : \w+)?", op.text)
            return int({"true": "1", "false": "0"}.get(number[1], number[1])) if number else Unknown(op.results[0])
        if kind == "select" and isinstance(values[0], int):
            return values[1] if values[0] else values[2]
        kind += op.text.split(",")[0] if kind == "cmpi" else ""
        if kind in ARITHMETIC and all(isinstance(value, int) for value in values):
            return ARITHMETIC[kind](*values)
        if kind in ("addi", "subi") and isinstance(values[0], Unknown) and isinstance(values[1], int):
            return Unknown(values[0].name, ARITHMETIC[kind](values[0].plus, values[1]))
        return Unknown(op.results[0])

    def start_copy(self, op: Operation, target: Buffer) -> None:
        self.write(op, target)
        self.state.started.append(target)
        self.copied.add(target.ring)
        if self.state.running:
            self.overlaps.add(op.results[0])

    def start_tensor_memory_product(self, op: Operation) -> None:
        """Its operands are left, right, sum, two flags, and each barrier that it signals with a flag."""
        left, right, total, _, runs, *barriers = op.operands
        if self.value(runs) == 0:
            return
        operands, total = self.buffers([left, right]), self.buffer(total)
        self.read(op, operands)
        signal = None
        if barriers:
            barrier = self.buffer(barriers[0])
            self.state.signals[barrier] += 1
            signal = barrier, self.state.signals[barrier]
        self.state.running.append(Product(f"the product of {left} and {right}", operands, [total], signal))

    def wait_barrier(self, op: Operation) -> None:
        """Waits until the barrier's phase, which each signal turns, is not the one given; unless a flag is false."""
        barrier, phase, *flag = map(self.value, NAME.findall(op.text.split(" deps ")[0]))
        if not isinstance(barrier, Buffer) or not isinstance(phase, int):
            raise ValueError(f"the audit cannot tell what this waits for: {op.text}")
        if flag == [0]:
            return
        if self.state.waited[barrier] % 2 == phase:
            self.state.waited[barrier] += 1
        ended = [
            i + 1
            for i, product in enumerate(self.state.running)
            if product.signal and product.signal[0] == barrier and product.signal[1] <= self.state.waited[barrier]
        ]
        del self.state.running[: max(ended, default=0)]

    def read(self, op: Operation, sources: list[Buffer]) -> None:
        copies = [target for group in (*self.state.under_way, self.state.started) for target in group]
        for source in sources:
            if source.ring in self.copied:
                self.reads.add(_says(op))
            if any(source.meets(target) for target in copies):
                self.races.add(f"{_says(op)} reads {source.ring} before its copy has arrived")

    def read_sum(self, op: Operation, source: Buffer) -> None:
        for product in self.state.running:
            if any(source.meets(total) for total in product.writes):
                self.races.add(f"{_says(op)} reads the sum {source.ring} of {product.name}, which may still be running")

    def write(self, op: Operation, target: Buffer) -> None:
        for product in self.state.running:
            if any(target.meets(used) for used in product.reads + product.writes):
                self.races.add(f"{_says(op)} writes {target.ring}, which {product.name} may still use")


def _last(items: list, count: int) -> list:
    return items[len(items) - min(count, len(items)) :]


def _attribute(op: Operation, name: str) -> int:
    return int(re.search(rf"\b{name} = (\d+)", op.text)[1])


def _says(op: Operation) -> str:
    return f"{op.name} {op.results[0] if op.results else op.operands[0]}"
