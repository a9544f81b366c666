from __future__ import annotations

import json
import math
import time

import pytest
import torch

pytest.importorskip("transformers")

from petl_mt.data import IGNORE  # noqa: E402
from petl_mt.train import update  # noqa: E402

from bench.random_model import write_checkpoint  # noqa: E402
from bench.shapes import m2m_config  # noqa: E402
from bench.step import trial  # noqa: E402
from bench.step.peft_settings import BASES, Setting, best, halves, largest_that_fits, search, why_none  # noqa: E402
from bench.step.peft_side import micro_batches  # noqa: E402
from bench.step.sentences import PAD, START, Data, batches, packed_batches, worst_batch  # noqa: E402
from bench.step.study import NO_TIME, OURS, PEFT, SHAPES, Study, beside_peft, tells  # noqa: E402
from bench.step.task import Result, Trial  # noqa: E402
from bench.step.trial import failed  # noqa: E402
from petl_kernels.errors import InputError  # noqa: E402
from petl_kernels.planning import chooser, planner  # noqa: E402
from petl_kernels.planning.cost import ASSUMED  # noqa: E402

PLAIN = Setting("bfloat16")
NO_ROOM = Result("out of memory", out_of_memory=True)
TINY = (2, 32, 64, 2, 200)
MIB = 2**20


def fake(capacity: dict[Setting, int], seconds=lambda setting, tokens: 1.0):
    """A run in which a setting has room for that many tokens; counts its calls."""
    calls = []

    def run(setting: Setting, tokens: int) -> Result:
        calls.append((setting, tokens))
        if tokens > capacity.get(setting, 0):
            return NO_ROOM
        return Result(seconds=[seconds(setting, tokens)])

    run.calls = calls
    return run


# ---- the search


def test_halves_go_down_to_one_sentence():
    assert halves(1024, 128) == [1024, 512, 256, 128]
    assert halves(1000, 300) == [1000, 500, 300]
    assert halves(64, 64) == [64]


@pytest.mark.parametrize("fits", [1024, 512, 256, 128, 64, 32, 16])
def test_bisection_finds_the_largest_that_fits(fits):
    sizes = halves(1024, 16)
    run = fake({PLAIN: fits})
    tried = largest_that_fits(PLAIN, run, sizes)
    assert max(t.micro_tokens for t in tried if t.fits) == fits
    assert len(run.calls) == len(set(run.calls)) <= 2 + math.ceil(math.log2(len(sizes)))
    larger = [t for t in tried if t.micro_tokens == 2 * fits]
    assert fits == 1024 or (larger and not larger[0].fits)


def test_a_setting_without_room_for_one_sentence_is_out_after_two_trials():
    run = fake({})
    tried = largest_that_fits(PLAIN, run, halves(1024, 16))
    assert [t.micro_tokens for t in tried] == [1024, 16] and best(tried) is None
    assert why_none(tried) == "out of memory (2 of 2 trials)"


def test_a_failure_of_another_kind_ends_a_setting_and_is_told():
    def run(setting, tokens):
        return Result("ValueError: no such kernel") if setting.base == "int8" else NO_ROOM

    tried = search(run, halves(1024, 16))
    assert [t.micro_tokens for t in tried if t.setting == Setting("int8")] == [1024]
    assert {t.setting.base for t in tried} == set(BASES)
    assert "ValueError: no such kernel (2 of 10 trials)" in why_none(tried)


def test_the_fastest_is_chosen_whatever_its_size():
    checkpointed, rounded = Setting("bfloat16", checkpointing=True), Setting("nf4")
    capacity = {PLAIN: 64, checkpointed: 512, rounded: 1024}
    times = {PLAIN: 3.0, checkpointed: 2.0, rounded: 4.0}
    tried = search(fake(capacity, lambda setting, tokens: times[setting] + 1 / tokens), halves(1024, 16))
    assert (best(tried).setting, best(tried).micro_tokens) == (checkpointed, 512)
    assert {t.setting for t in tried} >= {Setting("bfloat16", True, True), Setting("bfloat16", True, False, True)}


def test_adapters_in_fp32_and_compilation_are_tried_on_the_fastest():
    compiled = Setting("bfloat16", compiled=True)
    everything = dict.fromkeys([PLAIN, Setting("bfloat16", fp32_adapters=True), compiled], 1024)
    run = fake(everything, lambda setting, tokens: 0.5 if setting == compiled else 1.0)
    assert best(search(run, halves(1024, 16))).setting == compiled
    # the plain base fits in one piece: nothing that only makes room is tried
    assert [setting for setting, _ in run.calls] == list(everything)
    without = search(fake(everything), halves(1024, 16), compiled=False)
    assert not any(t.setting.compiled for t in without)


def test_the_whole_grid_has_every_setting():
    run = fake({})
    tried = search(run, halves(1024, 16), every=True)
    assert len({t.setting for t in tried}) == 3 * 2 * 2 * 2


# ---- what one cap says about another


def test_a_result_is_used_under_other_caps_only_where_it_holds():
    fits = Result(seconds=[1.0], least=400, most=500)
    assert tells(1000, fits, 500) and tells(1000, fits, 2000) and not tells(1000, fits, 450)
    assert tells(480, fits, 490)  # it ran inside 480
    assert tells(1000, NO_ROOM, 999) and tells(1000, NO_ROOM, 1000) and not tells(1000, NO_ROOM, 1001)
    assert tells(1000, Result("ValueError: x"), 5) and not tells(1000, Result(NO_TIME), 1000)


def test_a_study_runs_a_trial_once_and_says_why_peft_has_none(tmp_path):
    ran = []

    def run(trial: Trial, limit: float) -> Result:
        ran.append(trial)
        if trial.setting is not None and trial.memory < 300 * MIB:
            return NO_ROOM
        return Result(seconds=[2.0 if trial.setting else 0.5], least=250 * MIB, most=250 * MIB, target_tokens=10)

    study = Study("cpu", tmp_path, math.inf, 60, every=False, results=tmp_path / "caps.json", run=run)
    study._checkpoint = lambda shape: tmp_path
    (shape,) = SHAPES["cpu"]
    for cap in ("512MiB", "320MiB"):
        peft, ours = study.side(shape, cap, PEFT), study.side(shape, cap, OURS)
        assert beside_peft(study, shape, cap, ours)["ratio"] == 4.0 and beside_peft(study, shape, cap, peft) == {}
    assert len([t for t in ran if t.setting]) == 2  # adapters in bf16 and fp32; nothing anew under 320 MiB
    ours = study.side(shape, "160MiB", OURS)
    study.side(shape, "160MiB", PEFT)
    told = beside_peft(study, shape, "160MiB", ours)
    assert "out of memory" in told["peft"] and "ratio" not in told
    cells = json.loads((tmp_path / "caps.json").read_text())["cells"]  # written after each side
    assert len(cells) == 6 and "bfloat16 base, bf16 adapters" in json.dumps(cells)


def test_no_trial_starts_when_time_is_up(tmp_path):
    study = Study("cpu", tmp_path, time.monotonic() - 1, 60, every=False, run=lambda *_: pytest.fail("a trial ran"))
    (shape,) = SHAPES["cpu"]
    ours, _, peft = study.cell(shape, "512MiB")
    assert ours.result.failure == NO_TIME and NO_TIME in peft.result.failure


def test_a_trial_that_the_end_cut_says_nothing_about_other_caps(tmp_path):
    late = Result("not done after 9 s", late=True)
    (shape,) = SHAPES["cpu"]
    for left, expected in ((9, NO_TIME), (900, late.failure)):
        study = Study("cpu", tmp_path, time.monotonic() + left, 60, every=False, run=lambda *_: late)
        study._checkpoint = lambda shape: tmp_path
        assert study.side(shape, "512MiB", OURS).result.failure == expected


# ---- data


def test_batches_are_ragged_full_and_always_the_same():
    data = Data(512, 64, updates=4)
    first, again = batches(data, 200), batches(data, 200)
    assert len(first) == 4
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.source, other.source) and torch.equal(one.labels, other.labels)
        width = max(one.source.shape[1], one.labels.shape[1])
        assert 512 - width < len(one.source) * width <= 512
        assert one.target_tokens < one.labels.numel() or one.source.shape != one.labels.shape
    widths = [batch.source.shape[1] for batch in first]
    assert len(set(widths)) > 1
    assert worst_batch(data, 200).source.shape == (8, 64)


def test_packed_batches_have_the_same_sentences():
    data = Data(512, 64, updates=2)
    for padded, row in zip(batches(data, 200), packed_batches(data, 200), strict=True):
        assert torch.equal(row.source[0], padded.source[padded.source != PAD])
        assert torch.equal(row.labels[0], padded.labels[padded.labels != IGNORE])
        assert (padded.indices == row.indices).all() and row.row["decoder_input_ids"][0, 0] == START


def test_micro_batches_are_the_batch():
    batch = batches(Data(512, 64, updates=1), 200)[0]
    parts = list(micro_batches(batch, 128, torch.device("cpu")))
    assert len(parts) > 1 and all(part.source.numel() <= 128 and part.labels.numel() <= 128 for part in parts)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert len(list(micro_batches(batch, 1, torch.device("cpu")))) == len(batch.source)


# ---- real trials


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(m2m_config(*TINY), folder)
    return str(folder)


def tiny(checkpoint: str, memory: int, **options) -> Trial:
    return Trial(TINY, checkpoint, memory, "cpu", Data(128, 32, updates=1), rounds=2, **options)


@pytest.mark.slow
def test_both_sides_train_on_the_same_weights_and_words(checkpoint):
    pytest.importorskip("peft")
    ours = trial.measure(tiny(checkpoint, 64 * MIB))
    peft = trial.measure(tiny(checkpoint, 64 * MIB, setting=PLAIN, micro_tokens=64))
    for result in (ours, peft):
        assert not result.failure and len(result.seconds) == 2 and 0 < result.most < 64 * MIB
    assert (ours.source_tokens, ours.target_tokens) == (peft.source_tokens, peft.target_tokens)
    assert ours.loss == pytest.approx(peft.loss, rel=0.02) == pytest.approx(math.log(200), rel=0.1)


@pytest.mark.slow
def test_ours_goes_on_in_smaller_parts_where_a_step_finds_no_room(checkpoint, monkeypatch):
    """The trainer's own way: the result has the plan that the updates ended with."""
    run, parts = update.Update._backward, []

    def tight(self, batch, tokens):
        parts.append(len(batch.indices))
        if len(parts) == 1:
            raise torch.OutOfMemoryError
        return run(self, batch, tokens)

    monkeypatch.setattr(update.Update, "_backward", tight)
    found = trial.measure(tiny(checkpoint, 64 * MIB))
    assert parts[0] == 4 and found.plan["rows"] == 2 and max(parts[1:3]) == 2  # of the worst batch
    assert not found.failure and found.loss == pytest.approx(math.log(200), rel=0.1)


@pytest.mark.slow
def test_a_plan_that_approximates_nothing_is_no_result_of_its_own(checkpoint):
    assert trial.measure(tiny(checkpoint, 64 * MIB, allow=("quantized",))).failure == "the plan approximates nothing"


@pytest.mark.parametrize("setting", [Setting("nf4"), Setting("int8", checkpointing=True)])
def test_a_rounded_base_trains(checkpoint, setting):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    result = trial.measure(tiny(checkpoint, 64 * MIB, setting=setting, micro_tokens=128))
    assert result.loss == pytest.approx(math.log(200), rel=0.1)


@pytest.mark.slow
def test_a_trial_without_room_is_a_result(checkpoint):
    pytest.importorskip("peft")
    pytest.importorskip("petl_kernels._C")
    result = trial.run(tiny(checkpoint, 100_000, setting=PLAIN, micro_tokens=128), 60)
    assert result.out_of_memory and result.failure == "out of memory" and result.seconds == []


@pytest.mark.slow
def test_a_trial_that_takes_too_long_is_ended(checkpoint):
    began = time.monotonic()
    result = trial.run(tiny(checkpoint, 64 * MIB), 0.01)
    assert result.failure == "not done after 0 s" and time.monotonic() - began < 30


@pytest.mark.slow
def test_a_budget_that_no_plan_has_is_told(checkpoint, monkeypatch):
    monkeypatch.setattr(chooser, "APPROXIMATIONS", {})  # what they would bring takes time to count
    monkeypatch.setattr(planner, "measure_rates", lambda *_: ASSUMED)
    with pytest.raises(InputError) as error:
        trial.measure(tiny(checkpoint, 20_000))
    assert "expected at least that" in failed(error.value).failure


def test_a_crash_is_told(checkpoint):
    wrong = trial.run(tiny(checkpoint + "-none", 64 * MIB, setting=PLAIN, micro_tokens=128), 240)
    assert wrong.failure and not wrong.out_of_memory


def test_memory_errors_are_found_behind_others():
    try:
        try:
            raise torch.OutOfMemoryError("CPU tensors: 5 bytes beside 3")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("backend failed") from error
    except RuntimeError as error:
        assert failed(error).out_of_memory
    assert failed(RuntimeError("CUDA out of memory. Tried")).out_of_memory
    assert failed(ValueError("a\nb")).failure == "ValueError: a"
