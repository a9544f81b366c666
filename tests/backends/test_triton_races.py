"""The audit of races finds them: in small TTGIR written by hand, and in a kernel that Triton compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_races

# Step i works on buffer i % BUFFERS of the ring, and the copy that it starts is for step i + 2.
KERNEL = """
#mma = #ttg.nvidia_mma<{versionMajor = 3}>
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @kernel(%x: !pointers loc("x"(#loc)), %K: i32 loc("K"(#loc))) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c2 = arith.constant 2 : i32 loc(#loc1)
    %length = arith.constant BUFFERS : i32 loc(#loc1)
    %true = arith.constant true loc(#loc1)
    %zeros = arith.constant dense<0.000000e+00> : !sums loc(#loc1)
    %ring = ttg.local_alloc : () -> !ring loc(#loc1)
    %sums = ttng.tmem_alloc : () -> !sums loc(#loc1)
    %end = ttg.local_alloc : () -> !barrier loc(#loc1)
    ttng.init_barrier %end, 1 : !barrier loc(#loc1)
    %first = ttg.memdesc_index %ring[%c0] : !ring -> !tile loc(#loc1)
    %copy = ttg.async_copy_global_to_local %x, %first : !pointers -> !tile loc(#loc1)
    %group = ttg.async_commit_group tokens %copy loc(#loc1)
    %second = ttg.memdesc_index %ring[%c1] : !ring -> !tile loc(#loc1)
    %copy_0 = ttg.async_copy_global_to_local %x, %second : !pointers -> !tile loc(#loc1)
    %group_1 = ttg.async_commit_group tokens %copy_0 loc(#loc1)
    %out:3 = scf.for %k = %c0 to %K step %c1 iter_args(%acc = %zeros, %at = %c0, %phase = %c0) -> (!sums, i32, i32) {
      %next = arith.addi %at, %c1 : i32 loc(#loc1)
      %next_over = arith.cmpi sge, %next, %length : i32 loc(#loc1)
      %next_at = arith.select %next_over, %c0, %next : i32 loc(#loc1)
      %plus = arith.addi %at, %c2 : i32 loc(#loc1)
      %over = arith.cmpi sge, %plus, %length : i32 loc(#loc1)
      %less = arith.subi %plus, %length : i32 loc(#loc1)
      %later_at = arith.select %over, %less, %plus : i32 loc(#loc1)
      %next_phase = arith.xori %phase, %c1 : i32 loc(#loc1)
      %tile = ttg.memdesc_index %ring[%at] : !ring -> !tile loc(#loc1)
      %turned = ttg.memdesc_trans %tile {order = array<i32: 1, 0>} : !tile -> !tile loc(#loc1)
      %later = ttg.memdesc_index %ring[%later_at] : !ring -> !tile loc(#loc1)
STEP
      scf.yield %acc, %next_at, %next_phase : !sums, i32, i32 loc(#loc1)
    } loc(#loc1)
END
    ttg.local_dealloc %ring : !ring loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
"""
ARRIVED = "%arrived = ttg.async_wait %group {num = 1 : i32}"
TOO_EARLY = "%arrived = ttg.async_wait %group {num = 2 : i32}"
COPY = """%more = ttg.async_copy_global_to_local %x, %later : !pointers -> !tile
          %more_group = ttg.async_commit_group tokens %more"""
LOAD = "%left = ttg.local_load %tile token %arrived : !tile -> tensor<64x64xbf16, #mma>"
SM_90 = "%dot = ttng.warp_group_dot %tile, %turned, %acc {isAsync = true} : !tile * !tile -> !sums"
ONE_RUNS = "%waited = ttng.warp_group_dot_wait %dot {pendings = 1 : i32} : !sums"
NONE_RUNS = "%waited = ttng.warp_group_dot_wait %dot {pendings = 0 : i32} : !sums"
SM_100 = "ttng.tc_gen5_mma %tile, %turned, %sums, %true, %true, %end[%true] {is_async} : !tile, !tile, !sums, !barrier"
ENDED = "ttng.wait_barrier %end, %phase deps %tile, %turned : !barrier, !tile, !tile"
OTHER_PHASE = ENDED.replace("%phase", "%next_phase")
RESULT = "%loaded = ttng.tmem_load %sums : !sums -> tensor<64x64xf32, #mma>"
OVERWRITTEN = "async_copy_global_to_local %more writes %ring"
EARLY = "reads %ring before its copy has arrived"


@pytest.mark.parametrize(
    ("buffers", "step", "end", "expected"),
    [
        # sm_90: the failure of Triton's pipeline, the buffer that it lacks, and a wait for all products.
        (2, [ARRIVED, SM_90, ONE_RUNS, COPY], NONE_RUNS, OVERWRITTEN),
        (3, [ARRIVED, SM_90, ONE_RUNS, COPY], NONE_RUNS, None),
        (2, [ARRIVED, SM_90, NONE_RUNS, COPY], "", None),
        (3, [ARRIVED, SM_90, COPY, ONE_RUNS], NONE_RUNS, OVERWRITTEN),
        (2, [ARRIVED, SM_90.replace("isAsync = true", ""), COPY], "", None),
        (3, [ARRIVED, SM_90, ONE_RUNS, COPY], "", "local_dealloc %ring writes %ring"),
        (3, [TOO_EARLY, SM_90, ONE_RUNS, COPY], NONE_RUNS, EARLY),
        (3, [ARRIVED, "ttg.local_store %zeros, %tile : !sums -> !tile", SM_90, ONE_RUNS, COPY], NONE_RUNS, None),
        (3, [ARRIVED, SM_90, "ttg.local_store %zeros, %tile : !sums -> !tile", ONE_RUNS, COPY], NONE_RUNS, "store"),
        # sm_80: the loads are over when the copy starts; a ring too short, and a wait for too few copies.
        (2, [ARRIVED, LOAD, COPY], "", None),
        (2, [COPY, ARRIVED, LOAD], "", EARLY),
        (2, [TOO_EARLY, LOAD, COPY], "", EARLY),
        # sm_100: only the barrier ends a product, and only the phase that it began.
        (2, [ARRIVED, SM_100, ENDED, RESULT, COPY], "", None),
        (2, [ARRIVED, SM_100, COPY, ENDED], "", OVERWRITTEN),
        (2, [ARRIVED, SM_100, OTHER_PHASE, COPY], "", OVERWRITTEN),
        (3, [ARRIVED, SM_100, RESULT, ENDED, COPY], "", "reads the sum %sums"),
    ],
)
def test_by_hand(buffers, step, end, expected):
    audit = triton_races.audit(_kernel(buffers, "\n".join(step), end))
    assert audit.reads
    if expected is None:
        assert not audit.races
    else:
        assert any(expected in race for race in audit.races), audit.races


@pytest.mark.parametrize("step", ["ttng.new_copy %tile : !tile", "%a = ttg.memdesc_index %ring[%program] : !ring"])
def test_what_it_does_not_know_is_refused(step):
    with pytest.raises(ValueError, match="the audit"):
        triton_races.audit(_kernel(2, step, ""))


def _kernel(buffers: int, step: str, end: str) -> str:
    return KERNEL.replace("BUFFERS", str(buffers)).replace("STEP", step).replace("END", end)


def test_in_compiled_kernels():
    """One load for a product and a sum is the race that Triton makes; with a load for each there is none."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("racing_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    one, two = map(json.loads, run.stdout.splitlines())
    assert len(one["races"]) == 1 and "async_copy_global_to_local %left" in one["races"][0]
    assert not two["races"] and two["overlaps"]
