"""Every model family through the trainer: the loss that the family's own code computes, training, search, merging."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import write
from petl_mt.cli import main
from petl_mt.config import Pair, TrainConfig
from petl_mt.data import IGNORE, encode_pairs
from petl_mt.evaluate import fitting_length, validation_loss
from petl_mt.inference import Translator
from petl_mt.models.adapt import set_dropout
from petl_mt.models.load import check_positions, decoder_start
from petl_mt.train import train
from petl_mt.train.budget import plan_without_text
from transformers import AutoModelForSeq2SeqLM

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_pretrained
from petl_kernels.interop.languages import LanguagePair
from petl_kernels.layers.wide_linear import WideLinear

_spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "interop" / "conftest.py")
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

NLLB = ("eng_Latn", "swh_Latn")
LANGUAGES = {
    "nllb": NLLB,
    "nllb-moe": NLLB,
    "seamless": ("eng", "swh"),
    "mbart50": ("en_XX", "de_DE"),
    "mbart25": ("en_XX", "de_DE"),
}
CHECKPOINTS = ["nllb", "nllb-moe", "mbart50", "mbart25", "marian", "marian-separate"]
CHECKPOINTS += ["t5", "t5-tied", "umt5", "byt5", "seamless", "t5gemma"]
# Their losses, languages and tables are in the other tests; the run is that of another.
MARKS = dict.fromkeys(("mbart25", "marian-separate", "t5-tied", "umt5"), pytest.mark.repeat)  # as others are
MARKS |= dict.fromkeys(("byt5", "nllb-moe", "seamless", "t5gemma"), pytest.mark.slow)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """Returns (folder, source language, target language) of a random checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = families.make_tokenizer(request.param, folder / "pieces")
    rows = 1 + max(tokenizer.get_vocab().values())
    model = families.make_model(request.param, rows, layers=2 if request.param == "nllb-moe" else 1)
    if request.param == "mbart50":  # as its checkpoints have it
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", *LANGUAGES.get(request.param, ("en", "de"))


@pytest.fixture
def pair(checkpoint, tmp_path) -> Pair:
    lines = families.sentences(40, seed=5)
    return Pair(*checkpoint[1:], write(tmp_path / "source", lines), write(tmp_path / "target", lines[::-1]))


def read(checkpoint, pair, lines: int):
    """Returns (model, its corpus of so many lines, the id that its decoder starts with)."""
    model, tokenizer = load_pretrained(checkpoint[0])
    language = LanguagePair(model, tokenizer, *checkpoint[1:])
    texts = [text.split("\n")[:lines] for text in (Path(pair.source).read_text(), Path(pair.target).read_text())]
    corpus, _ = encode_pairs([(pair, *texts)], {pair.name: language}, 60)
    return model, corpus, decoder_start(model, language)


def test_the_loss_is_that_of_the_family(checkpoint, pair):
    model, corpus, start = read(checkpoint, pair, 7)
    total, tokens = 0.0, 0
    for indices in corpus.batch_indices(1):  # one sentence a batch: the families' own shifts need no padding then
        batch = corpus.collate(indices)
        count = int((batch.labels != IGNORE).sum())
        total += model(input_ids=batch.source, labels=batch.labels).loss.item() * count
        tokens += count
    found = validation_loss(model, corpus, 100, start)
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_sentences_longer_than_the_positions_are_refused_before_training(checkpoint, pair, tmp_path):
    """The models have 64 positions. M2M-100 and NLLB make more as they need them, T5 has none."""
    model, _, start = read(checkpoint, pair, 1)
    if model.config.model_type not in ("mbart", "marian"):
        check_positions(model, 400)
        ids = torch.full((1, 80), 5)
        assert torch.isfinite(model(input_ids=ids, decoder_input_ids=ids).logits).all()
        return
    config = TrainConfig(
        model=str(checkpoint[0]), out=str(tmp_path / "run"), train=[pair], method="lora", max_length=65
    )  # fmt: skip
    with pytest.raises(InputError, match="max_length 65: the model has 64 positions; expected at most as many"):
        train(config, quiet=True)
    with pytest.raises(InputError, match="max_length 65: the model has 64 positions"):
        plan_without_text(dataclasses.replace(config, memory="1GiB"))
    assert not (tmp_path / "run").exists()
    ids = torch.full((1, 64), 5)
    assert torch.isfinite(model(input_ids=ids, decoder_input_ids=ids).logits).all()
    assert fitting_length(model, 400) == 64 and fitting_length(model, 40) == 40


@pytest.mark.parametrize(
    "checkpoint",
    [pytest.param(name, marks=MARKS[name]) if name in MARKS else name for name in CHECKPOINTS],
    indirect=True,
    scope="module",
)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.repeat)])
def test_lora_from_text_to_a_merged_folder(checkpoint, pair, tmp_path, precision):
    config = TrainConfig(
        model=str(checkpoint[0]), out=str(tmp_path / "run"), train=[pair], valid=[pair], method="lora",
        method_args={"rank": 2}, steps=6, batch_tokens=240, max_length=60, lr=3e-3, beam=2, precision=precision,
    )  # fmt: skip
    model, corpus, start = read(checkpoint, pair, 40)
    before = validation_loss(model, corpus, 100, start)  # of the same lines: those of single updates differ
    result = train(config, quiet=True)
    assert result.valid_loss < before and result.data[0]["lines"] == 40
    hypotheses = (tmp_path / "run" / "valid.best.hyp").read_text(encoding="utf-8").splitlines()
    assert len(hypotheses) == 40 and not any("<" in line or "__" in line for line in hypotheses)
    assert main(["merge", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["t5gemma"], indirect=True, scope="module")
def test_t5gemma_under_a_budget(checkpoint, pair, tmp_path, capsys):
    """Its configuration is nested: a plan from the config alone; a run that is planned, translates and is scored."""
    config = (Path(checkpoint[0]) / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    given = ["--method", "lora", "--method-arg", "rank=2", "--memory", "3MiB", "--batch-tokens", "240"]
    given += ["--max-length", "60", "--tier", "3", "--beam", "2"]
    plan = ["plan", "--model", str(tmp_path / "config.json"), "--device", "cpu", "--json", str(tmp_path / "plan.json")]
    assert main([*plan, *given]) == 0 and "frozen weights" in capsys.readouterr().out
    config = TrainConfig(
        model=str(checkpoint[0]), out=str(tmp_path / "run"), train=[pair], method="lora", method_args={"rank": 2},
        steps=3, batch_tokens=240, max_length=60, lr=3e-3, beam=2, memory="3MiB", tier=3, label_smoothing=0.1,
    )  # fmt: skip
    assert train(config, quiet=True).steps == 3
    run = ["--run", str(tmp_path / "run")]
    out = tmp_path / "translations"
    assert main(["translate", *run, "--in", pair.source, "--out", str(out)]) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 40
    assert main(["score", *run, "--test", pair.source, pair.target]) == 0 and "chrF" in capsys.readouterr().out


def test_dropout_settings_reach_every_family(checkpoint):
    """With a rate near one the model computes something else in training; with zero it does not."""
    model, _ = load_pretrained(checkpoint[0])
    ids = torch.tensor([[5, 6, 7, 8]])
    exact = model(input_ids=ids, decoder_input_ids=ids).logits
    model.train()
    set_dropout(model, 0.0, 0.0)
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, exact)
    for rates in ((0.9, 0.0), (0.0, 0.9)):
        set_dropout(model, *rates)
        assert (model(input_ids=ids, decoder_input_ids=ids).logits - exact).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["nllb-moe", "seamless"])
def test_rates_of_activations_and_experts_stay(family):
    """These configurations have ``activation_dropout`` and ``moe_token_dropout`` beside ``dropout``."""
    model = families.make_model(family, 99, layers=2)
    set_dropout(model, 0.3, 0.2)
    rates = {path: module.p for path, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {rate for path, rate in rates.items() if path.endswith("attn_dropout")} == {0.3}
    others = {path: rate for path, rate in rates.items() if not path.endswith("attn_dropout")}
    assert len(others) >= 8 and set(others.values()) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["t5"], indirect=True, scope="module")
def test_a_t5_trained_whole_in_fp16_translates_under_a_budget_with_its_last_projections_in_fp32(
    checkpoint, pair, tmp_path
):
    """A run without an adapter is loaded without being prepared for training."""
    settings = {"model": str(checkpoint[0]), "out": str(tmp_path / "run"), "train": [pair], "method": "full"}
    train(TrainConfig(**settings, precision="fp16", steps=1, beam=1, batch_tokens=300, max_length=60), quiet=True)
    translator = Translator(tmp_path / "run", memory="64MiB")
    wide = {path.rpartition(".")[2] for path, m in translator.model.named_modules() if isinstance(m, WideLinear)}
    assert wide == {"wo"} and len(list(translator.stream(["one two"]))) == 1
