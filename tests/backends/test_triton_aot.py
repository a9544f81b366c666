"""Every Triton kernel compiled without a GPU: matrix instructions, spilled registers, shared memory, data races."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_aot.py")
# The KB of shared memory that a block may have.
KILOBYTES = {"sm75": 64, "sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99}
SHARED_MEMORY = {card: 1024 * size for card, size in KILOBYTES.items()}
MATRIX_INSTRUCTION = {"sm90": "wgmma.mma_async", "sm100": "tcgen05.mma"}
WITHOUT_PRODUCT = {
    *("_sum_kernel", "_column_sums_kernel", "_fold_kernel", "_norm_gradients_kernel", "_rows_kernel"),
    *("_latent_gradient_kernel", "_norm_kernel", "_norm_again_kernel", "_norm_dx_kernel"),
    *("_sums_kernel", "_loss_kernel", "_dequantize_kernel", "_project_rows_kernel", "_project_back_rows_kernel"),
    *("_begin_kernel", "_words_kernel", "_end_kernel"),
    *("_quantize_int8_kernel", "_quantize_nf4_kernel", "_quantize_absmax_kernel"),
}
ELEMENTWISE = {
    *("_activation_kernel", "_activation_backward_kernel", "_gated_kernel", "_gated_backward_kernel"),
    *("_positive_kernel", "_dropout_add_kernel", "_sum_norm_kernel", "_norm_backward_kernel"),
}
WITH_PRODUCT = {
    *("_project_kernel", "_rank_outputs_kernel", "_rank_gradients_kernel", "_rank_input_kernel"),
    *("_inputs_kernel", "_gradients_kernel", "_token_sum_kernel"),
    *("_adapter_gradients_kernel", "_forward_kernel", "_backward_kernel", "_token_sums_kernel"),
    *("_attention_kernel", "_query_gradient_kernel", "_key_gradients_kernel", "_sentence_gradients_kernel"),
    "_distance_gradient_kernel",
    *("_quantized_project_kernel", "_quantized_project_back_kernel"),
}
KERNELS = WITHOUT_PRODUCT | WITH_PRODUCT | ELEMENTWISE
ALONE = {"sm80", "sm90"}  # no other card stands for a launch of these
# The rows of the matrix instruction, where they are not the rows of the result: BN counts the rows of the weight.
LEFT = {"_quantized_project_kernel": "BN"}
# The kernels whose products run on while the tiles of a later step are copied, on cards with MATRIX_INSTRUCTION.
BESIDE_COPIES = {
    *("_adapter_gradients_kernel", "_forward_kernel", "_backward_kernel", "_token_sums_kernel"),
    "_quantized_project_kernel",
}
# A loop inside the one over its keys, which is not pipelined then.
WITHOUT_COPIES = {"_distance_gradient_kernel"}
# ptxas spills a register or two of its own accord where that lets one more block on a multiprocessor.
STACK = 16
# Without matrix instructions a thread holds whole rows of q and of do. Of 128 features they do not fit its registers.
STACK_OF_ROWS = 480


def test_a_product_is_compiled_with_wgmma_and_copies_ahead():
    """The kernels of one linear with LoRA, in seconds; all of them in the tests below."""
    reports = compile_kernels("few", "sm90")
    kernels = {"_rank_outputs_kernel", "_rank_input_kernel", "_adapter_gradients_kernel", "_sum_kernel"}
    assert {report["kernel"] for report in reports} == kernels
    assert_no_problems(reports)


@pytest.mark.slow
@pytest.mark.parametrize("cards", [("sm75", "sm80"), ("sm86", "sm89", "sm120"), ("sm90",), ("sm100",)], ids=" ".join)
def test_every_kernel_is_compiled_for_every_card(cards):
    """The first launch of each, whose code no other card has."""
    reports = compile_kernels("first", *cards)
    for card in {"sm80", "sm90"} & {*cards}:
        assert {report["kernel"] for report in reports if report["card"] == card} == KERNELS
    if "sm75" in cards:
        kernels_of_t4 = {report["kernel"] for report in reports if "sm75" in report["cards"]}
        assert kernels_of_t4 >= WITH_PRODUCT - {"_sentence_gradients_kernel"}
    assert_no_problems(reports)


# Where another card has the same launch, its compiled code and this card's shared memory say what counts.
@pytest.mark.slow
@pytest.mark.repeat  # the same kernels with other tiles and options; to be run where a kernel or a tile changes
@pytest.mark.parametrize(
    ("card", "part"),
    [*((card, "own") for card in SHARED_MEMORY), *((card, "shared") for card in SHARED_MEMORY if card not in ALONE)],
)
def test_every_launch_is_compiled(card, part):
    assert_no_problems(compile_kernels(part, card))


def assert_no_problems(reports: list[dict]) -> None:
    assert {report["kernel"] for report in reports} <= KERNELS
    found = [f"{problem}: {report}" for report in reports for problem in problems(report["card"], report)]
    assert not found, "\n".join(found)


def compile_kernels(part: str, *cards: str) -> list[dict]:
    """In a process of its own: in this one the kernels may be the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, SCRIPT, part, *cards], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def problems(card: str, report: dict) -> Iterator[str]:
    yield from report["races"]
    rows = (card, report["kernel"], report["constexprs"].get("BD")) == ("sm75", "_query_gradient_kernel", 128)
    if report["stack"] > (STACK_OF_ROWS if rows else STACK):
        yield f"spills {report['stack']} bytes"
    for name in report["cards"]:
        if report["shared"] > SHARED_MEMORY[name]:
            yield f"needs {report['shared']} bytes of shared memory, {name} has {SHARED_MEMORY[name]}"
    if report["atomics"]:
        yield "uses atomics, whose sums depend on the order of arrival"
    if report["kernel"] in WITH_PRODUCT:
        ahead = report["kernel"] not in WITHOUT_COPIES and card != "sm75"
        if ahead and not report["instructions"]["cp.async.c"]:
            yield "does not copy its operands ahead"
        if ahead and not report["reads"]:
            yield "shows the audit of races no tile that is copied ahead"
        # fp32 keeps its precision, so it has no matrix instruction; blocks under 64 rows have Ampere's.
        large = report["constexprs"][LEFT.get(report["kernel"], "BM")] >= 64
        instruction = MATRIX_INSTRUCTION.get(card, "mma.sync") if large else "mma.sync"
        if card == "sm75":
            instruction = "fma.rn.f32"
            if report["instructions"]["fma.rn.f16"]:
                yield "adds up in fp16"
        if (card == "sm75" or report["dtype"] != "float32") and not report["instructions"][instruction]:
            yield f"has no {instruction}"
        beside = large and card in MATRIX_INSTRUCTION and report["kernel"] in BESIDE_COPIES
        if report["dtype"] != "float32" and beside and not report["overlaps"]:
            yield "shows the audit of races no copy beside a product"
