"""petl-mt fits: its plans are those of petl-mt plan at the rates of a card, its refusals those of the planner."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.fits import rows as fits
from petl_mt.fits.rows import MODELS, Row, cards_named, model_named, plan_rows
from petl_mt.fits.tables import page, rate
from petl_mt.train.budget import plan_without_text

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_outline
from petl_kernels.planning import planner
from petl_kernels.planning.cards import CARDS
from petl_kernels.planning.chooser import Chooser
from petl_kernels.units import format_size

# Millions of parameters: those that papers and model cards give, where they give as many digits.
PUBLISHED = {
    "m2m-418m": 483.9,
    "m2m-1.2b": 1239.5,
    "nllb-600m": 615.1,
    "nllb-1.3b": 1370.6,
    "nllb-3.3b": 3344.9,
    "mbart-50-large": 610.9,
    "marian-big": 237.7,
    "mt5-base": 582.4,
    "mt5-large": 1229.6,
    "mt5-xl": 3742.6,
    "madlad-3b": 2940.4,
}
QUICK = ("nllb-600m", "mt5-base")
SETTINGS = {"max_length": 16, "batch_tokens": 64, "tier": 1}  # each tier that a plan may choose is counted


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED])
def test_shipped_configs_have_the_parameters_of_their_models(name):
    model = load_outline(MODELS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == PUBLISHED[name]


def test_every_shipped_config_is_checked():
    assert set(MODELS) == set(PUBLISHED)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The config of a model of one layer a side, as a file in a folder that has its name."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    config = json.loads(MODELS["nllb-600m"].read_text())
    widths = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    (folder / "config.json").write_text(json.dumps(config | widths | heads | {"d_model": 32, "vocab_size": 96}))
    return str(folder / "config.json")


@pytest.mark.slow
def test_a_row_has_the_plan_that_petl_mt_plan_makes_on_such_a_card(tiny, monkeypatch):
    (row,) = plan_rows(["L4"], [tiny], TrainConfig(**SETTINGS), ["lora"])
    rates = CARDS["L4"].rates(torch.bfloat16)
    monkeypatch.setattr(planner, "measure_rates", lambda device, dtype: rates)
    monkeypatch.setattr(Chooser, "more", lambda *_: ())  # what larger budgets would bring
    given = {"model": tiny, "method": "lora", "memory": str(CARDS["L4"].memory), "precision": "bf16", "beam": 1}
    expected = plan_without_text(TrainConfig(**given, **SETTINGS), "cuda")
    assert row.plan == dataclasses.replace(expected, search=None, evaluation_tokens=16)  # no evaluation is planned
    assert row.plan.cuda_graphs and row.tokens_a_second == 64 / row.plan.seconds


@pytest.mark.slow
def test_cards_and_dtypes(tiny):
    found = list(plan_rows(["T4", "H200"], [tiny], TrainConfig(**SETTINGS), ["lora"]))
    assert [(row.card, row.model, row.plan.precision) for row in found] == [
        ("T4", "tiny", "fp16"),
        ("H200", "tiny", "bf16"),
    ]
    slow, fast = (row.tokens_a_second for row in found)
    assert fast > 10 * slow


def test_what_does_not_fit_has_the_planners_reason(tiny, monkeypatch):
    monkeypatch.setitem(CARDS, "T4", dataclasses.replace(CARDS["T4"], memory=600 * 2**20))
    monkeypatch.setattr(Chooser, "least", lambda self, allow: 2**30)  # counts every approximation
    (row,) = plan_rows(["T4"], [tiny], TrainConfig(**SETTINGS), ["lora"])
    assert row.plan is None and "one sentence pair of 16 tokens needs 1 GiB" in row.refusal and rate(row) == "-"
    with pytest.raises(ValueError, match="without a plan"):
        row.tokens_a_second  # noqa: B018
    text = page([row], "petl-mt fits", {"torch": "1", "transformers": "2"})
    assert f"- tiny, lora: {row.refusal}" in text and "| tiny | - |" in text


def test_the_command_writes_a_page(tiny, tmp_path, capsys):
    page = tmp_path / "FITS.md"
    flags = ["--model", tiny, "--card", "h200", "--card", "rtx-4060", "--method", "lora"]
    flags += ["--max-length", "16", "--batch-tokens", "64", "--markdown", str(page)]
    assert main(["fits", *flags]) == 0
    printed, text = capsys.readouterr().out, page.read_text(encoding="utf-8")
    assert printed.count("tiny") == 2 and "predictions" in printed and f"written: {page}" in printed
    assert f"`petl-mt fits --model {tiny} --card h200 --card rtx-4060 --method lora" in text
    assert "**Tokens a second are predictions**" in text
    assert "780 TFLOP/s, measured" in text and "30.2 TFLOP/s, published (90%)" in text
    assert f"| RTX 4060 | {format_size(CARDS['RTX 4060'].memory)} | bf16 |" in text
    assert text.index("## H200") < text.index("## RTX 4060")


def test_names(tmp_path, monkeypatch):
    assert cards_named(["a100-40gb", "T4"]) == ["A100 40GB", "T4"] and cards_named(["all"]) == list(CARDS)
    with pytest.raises(InputError, match="card 'RTX 9': not in the table; expected T4, RTX 3060"):
        cards_named(["RTX 9"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cards_named([]) == ["T4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert cards_named([]) == ["A100 80GB"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    with pytest.raises(InputError, match="card 'Some Card', which is here: not in the table"):
        cards_named([])
    assert model_named("NLLB-600M") == ("nllb-600m", str(MODELS["nllb-600m"]))
    assert model_named("facebook/other")[0] == "other"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model", "nowhere/x.json"], "model 'nowhere/x.json': no such file"),
        (["--method", "lorra"], "method 'lorra': unknown; expected lora"),
        (["--max-length", "0"], "max_length 0: expected at least 1"),
    ],
)
def test_wrong_input_is_one_line(tiny, capsys, flags, line):
    given = [] if "--model" in flags else ["--model", tiny]
    assert main(["fits", "--card", "T4", *given, *flags]) == 2
    assert f"petl-mt fits: {line}" in capsys.readouterr().err


def test_rates_have_two_figures(tiny):
    (row,) = plan_rows(["T4"], [tiny], TrainConfig(**SETTINGS), ["lora"])
    plan = dataclasses.replace(row.plan, batch_tokens=4096, seconds=4096 / 123_456)
    assert rate(Row("T4", "tiny", "lora", plan)) == "120,000"
    assert fits.METHODS == ("lora", "adapter")
