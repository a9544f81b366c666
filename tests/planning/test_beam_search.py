"""Bytes of beam search: those that are counted on fake tensors against those that the allocator gives."""

from __future__ import annotations

import gc

import pytest
import torch
from methods.models import build
from transformers import LogitsProcessor, LogitsProcessorList

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.planning.beam_search import Search, SearchBytes, output_length
from petl_kernels.planning.planner import plan_search
from petl_kernels.step import cap
from petl_kernels.units import parse_size
from petl_kernels.weights.quantized import quantize_model

pytest.importorskip("petl_kernels._C")

CPU = torch.device("cpu")
WIDE = {"vocab_size": 2000, "d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "encoder_layers": 3}
WIDE |= {"decoder_layers": 3, "max_position_embeddings": 512}

# family, beam, storage, sentences, source tokens, output tokens
CASES = {
    "m2m100, beam 5": ("m2m100", 5, "dense", 6, 40, 24),
    "m2m100, greedy": ("m2m100", 1, "dense", 16, 40, 24),
    "m2m100, beam 5, int8": ("m2m100", 5, "int8", 6, 12, 24),
    "m2m100, beam 2, nf4": ("m2m100", 2, "nf4", 12, 12, 24),
    "t5, beam 5": ("t5", 5, "dense", 6, 40, 24),
    "t5, greedy": ("t5", 1, "dense", 16, 12, 24),
    "t5, beam 5, int8": ("t5", 5, "int8", 6, 24, 24),
    "t5gemma, beam 5": ("t5gemma", 5, "dense", 6, 40, 24),
    "t5gemma, greedy": ("t5gemma", 1, "dense", 16, 12, 24),
}
MARKS = {"m2m100, greedy": pytest.mark.slow, "m2m100, beam 5, int8": (), "t5, beam 5": pytest.mark.slow}


class _NeverEnds(LogitsProcessor):
    """Forbids the end of a sentence, with which a random model may begin."""

    def __init__(self, eos: int):
        self.eos = eos

    def __call__(self, ids, scores):
        scores[:, self.eos] = -1e9  # in place, which takes no bytes
        return scores


def made(family: str, storage: str):
    if family == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(3)
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=2000, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_decoder_layers=3, num_heads=4,
                feed_forward_proj="gated-gelu", decoder_start_token_id=0,
            )
        )  # fmt: skip
    elif family == "t5gemma":
        stack = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "head_dim": 32,
            "num_hidden_layers": 3,
            "sliding_window": 99,
        }
        model = build(family, vocab_size=2000, **stack)
    else:
        model = build(family, **WIDE)
    model = pk.adapt(model, pk.LoRA(rank=8, targets=("q", "v") if family == "t5" else ("q_proj", "v_proj")))
    return model if storage == "dense" else quantize_model(model, storage)


def measured(model, beam: int, rows: int, source: int, output: int) -> int:
    pk.lean(model, 1).eval()
    ids = torch.randint(5, 1900, (rows, source))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with torch.no_grad():
        for length in (3, output):  # the first run may make what stays
            gc.collect()
            with cap.capped(2**33, CPU):
                from petl_kernels import _C

                cap.reset_peak(CPU)
                before = _C.cpu_bytes()
                result = model.generate(
                    input_ids=ids, attention_mask=mask, num_beams=beam, early_stopping=beam > 1, do_sample=False,
                    max_length=None, max_new_tokens=length,
                    logits_processor=LogitsProcessorList([_NeverEnds(model.config.eos_token_id)]),
                )  # fmt: skip
                peak = cap.peak(CPU) - before
    assert result.shape[1] == output + 1
    return peak


@pytest.mark.parametrize("case", [pytest.param(case, marks=MARKS.get(case, pytest.mark.repeat)) for case in CASES])
def test_the_counted_bytes_are_the_measured_ones(case):
    family, beam, storage, rows, source, output = CASES[case]
    with torch.device("meta"):
        model = made(family, "dense")
    counted = Search(model, beam, 1, None, storage).peak(rows, source, output)
    found = measured(made(family, storage), beam, rows, source, output)
    print(case, counted / found)
    assert 0.98 * found <= counted <= 1.05 * found, (counted, found)


@pytest.mark.slow
def test_the_plane_holds_between_the_shapes_that_were_counted():
    with torch.device("meta"):
        model = made("m2m100", "dense")
    search = Search(model, 4, 1, None)
    plane = search.bytes(2**30, 64)
    for rows, source, output in ((1, 8, 48), (16, 40, 64), (2, 64, 160)):
        counted = search.peak(rows, source, output)
        assert 0.98 * counted <= plane.always + rows * plane.of(source, output) <= 1.15 * counted


@pytest.mark.slow
def test_layers_are_streamed_only_where_nothing_else_fits():
    with torch.device("meta"):
        model = made("m2m100", "dense")
    with pytest.raises(InputError, match="needs") as refused:
        plan_search(model, 2**10, ("dense", "dense"), 4, 32, CPU)
    number, unit = str(refused.value).split("needs ")[1].split(";")[0].split()
    least = parse_size(f"{1.01 * float(number)}{unit}")
    tight, roomy = (plan_search(model, memory, ("dense", "dense"), 4, 32, CPU) for memory in (least, 2**28))
    assert tight.streamed == 6 and roomy.streamed == 0
    assert tight.search.rows(32, 32) == 1 < roomy.search.rows(32, 32)


@pytest.mark.slow
def test_the_validation_loss_takes_less_than_a_step_of_as_many_tokens():
    from petl_kernels.planning import simulate
    from petl_kernels.planning.peak import Ledger

    with torch.device("meta"):
        model = made("m2m100", "dense")
    with simulate.fake_mode():
        like = simulate.shallow(model, 2, 2)
        for tier in (1, 4):
            simulate.set_tiers(like, [tier] * 4)
            step = simulate.step(like.train(), simulate.Batch(8, 32, 32)).peak
            for rows, length in ((8, 32), (32, 8), (1, 256)):  # as many tokens
                ids = torch.ones(rows, length, dtype=torch.long)
                with torch.no_grad(), Ledger([*like.parameters(), *like.buffers()]) as ledger:
                    before = ledger.live
                    like.eval()(input_ids=ids, attention_mask=ids, labels=ids, reduction="sum", use_cache=False)
                assert ledger.peak - before < step


def test_rows_of_a_batch():
    search = SearchBytes(memory=1100, always=100, sentence=10, source=2, output=1)
    assert search.rows(20, 50) == 10 and search.halved().rows(20, 50) == 5
    assert SearchBytes(100, 100, 10, 2, 1).rows(1, 1) == 0
    assert output_length(10, 256) == 52 and output_length(200, 256) == 256
