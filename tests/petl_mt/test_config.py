"""Options from YAML and from flags on top of them, checked and resolved."""

from __future__ import annotations

import pytest
import yaml
from petl_mt.cli import parser_for
from petl_mt.commands.training_options import train_config
from petl_mt.config import Pair, TrainConfig, default_lr
from petl_mt.config_file import load_yaml
from petl_mt.models.adapt import adapt
from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS


def from_flags(*flags: str) -> TrainConfig:
    return train_config(parser_for("train").parse_args(["train", *flags]))


def test_flags_go_on_top_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: some/model\ntrain: [a.en, a.de]\nsrc-lang: en\ntgt_lang: de\nlr: 3e-4\nsteps: 70\nbeam: 3\n"
    )
    config = from_flags("--config", str(path), "--steps", "9", "--out", "run")
    assert (config.model, config.steps, config.beam, config.lr, config.out) == ("some/model", 9, 3, 3e-4, "run")
    assert config.train == [Pair("en", "de", "a.en", "a.de")]


def test_one_pair_or_several():
    one = from_flags("--train", "a", "b", "--valid", "c", "d", "--src-lang", "en", "--tgt-lang", "sw")
    assert one.train == [Pair("en", "sw", "a", "b")] and one.valid == [Pair("en", "sw", "c", "d")]
    several = from_flags("--pair", "en-de", "a", "b", "--pair", "de-en", "b", "a", "--valid-pair", "en-de", "c", "d")
    assert [pair.name for pair in several.train] == ["en-de", "de-en"]
    assert several.valid == [Pair("en", "de", "c", "d")]


def test_method_arguments_are_typed():
    config = from_flags("--method-arg", "rank=16", "--method-arg", "targets=[q_proj, v_proj]")
    assert config.method_args == {"rank": 16, "targets": ["q_proj", "v_proj"]}


def test_what_is_written_reads_back(tmp_path):
    config = TrainConfig(model="m", out="o", train=[Pair("en", "de", "a", "b")], params="10%", betas=(0.8, 0.9))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert TrainConfig.from_dict(load_yaml(path)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown option 'learning_rat'"),
        ({"batch-token": 1}, "did you mean batch_tokens"),
        ({"steps": "many"}, "steps 'many': expected int"),
        ({"steps": 1.5}, "steps 1.5: expected int"),
        ({"steps": True}, "steps True: expected int"),
        ({"lr": "fast"}, "lr 'fast': expected float"),
        ({"vocab_text": "a.txt"}, "vocab_text 'a.txt': expected list"),
        ({"vocab_text": ["a.txt", None]}, "vocab_text ['a.txt', None]: expected list"),
        ({"betas": ["0.9", "0.98"]}, "betas ['0.9', '0.98']: expected tuple"),
        ({"betas": [0.9, True]}, "betas [0.9, True]: expected tuple"),
        ({"method_args": {1: 2}}, "method_args {1: 2}: expected dict"),
        ({"train": ["a", "b"]}, "src_lang and tgt_lang are needed"),
        ({"train": [{"source": "a"}]}, "expected two files, or a list of mappings"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(InputError) as refusal:
        TrainConfig.from_dict(values, "run.yaml")
    assert "run.yaml: " in str(refusal.value) and message in str(refusal.value)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "\x00", ""])
def test_files_that_are_no_mapping_are_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match="run.yaml"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model: not given"),
        ({"out": ""}, "out: not given"),
        ({"train": []}, "train: not given"),
        ({"steps": 0}, "steps 0: expected at least 1"),
        ({"steps": 10**20}, "steps 100000000000000000000: expected at most 2^31 - 1"),
        ({"batch_tokens": 2**31}, "batch_tokens 2147483648: expected at most 2^31 - 1"),
        ({"warmup": 10**20}, "warmup 100000000000000000000: expected at most 2^31 - 1"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0: expected at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"lr": 0.0}, "lr 0.0: expected above 0"),
        ({"schedule": "cosine"}, "schedule 'cosine': expected one of inverse-sqrt, linear, polynomial"),
        ({"optimizer": "sgd"}, "optimizer 'sgd': expected one of adamw, adamw8bit"),
        ({"precision": "fp8"}, "precision 'fp8': expected one of fp32, bf16, fp16"),
        ({"betas": (0.9, 1.0)}, "betas (0.9, 1.0)"),
        ({"batch_tokens": 100}, "batch_tokens 100: expected at least max_length (256)"),
        ({"params": "0%"}, "'0%'"),
        ({"params": "-1%"}, "'-1%'"),
        ({"params": "101%"}, "'101%'"),
        ({"params": "some"}, "'some'"),
        ({"memory": "8 apples"}, "'8 apples'"),
        ({"patience": 3}, "patience: needs validation text"),
        ({"model": "new", "method": "lora"}, "method 'lora': a new model is trained in full"),
        ({"train": [Pair("en", "de", "a", "b"), Pair("de", "en", "b", "a")]}, "need --model new"),
    ],
)
def test_configurations_that_cannot_run_are_refused(change, message):
    good = {"model": "m", "out": "o", "train": [Pair("en", "de", "a", "b")]}
    TrainConfig(**good).check()
    with pytest.raises(InputError) as refusal:
        TrainConfig(**{**good, **change}).check()
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change", [{"optimizer": "adamw8bit"}, {"allow": ["quantized", "8bit-optimizer"], "memory": "1GiB"}]
)
def test_8_bits_need_their_library(change, monkeypatch):
    config = TrainConfig(model="m", out="o", train=[Pair("en", "de", "a", "b")], **change)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"bitsandbytes is not installed; expected it \(pip install .*8bit"):
        config.check()
    config.check_settings()  # a plan needs no library


def test_defaults_follow_method_and_width():
    rates = {name: default_lr(name, 1024, is_new=False) for name in METHODS}
    full = rates["full"]
    assert all(10 * full <= rates[name] <= 30 * full for name in ("adapter", "pfeiffer", "parallel", "lora"))
    assert full == 3e-5 and rates["ia3"] == 3e-3 and rates["bitfit-biases"] == 1e-3 and rates["cross-attention"] == 1e-4
    assert default_lr("full", 256, is_new=False) == 4 * full
    adapted = TrainConfig(model="m", steps=500).resolve(1024)
    assert (adapted.method, adapted.schedule, adapted.warmup, adapted.eval_every) == ("adapter", "linear", 50, 50)
    new = TrainConfig(model="new", steps=100_000).resolve(512)
    assert (new.method, new.schedule, new.warmup, new.lr) == ("full", "inverse-sqrt", 4000, 5e-4)
    kept = TrainConfig(model="m", lr=0.5, warmup=0, eval_every=7, schedule="polynomial", method="ln").resolve(1024)
    assert (kept.lr, kept.warmup, kept.eval_every, kept.schedule, kept.method) == (0.5, 0, 7, "polynomial", "ln")


def test_the_code_of_norwegian_is_a_word(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ntrain: [a, b]\nsrc_lang: no\ntgt-lang: on\ntensorboard: no\n")
    config = TrainConfig.from_dict(load_yaml(path))
    assert config.train[0].name == "no-on" and config.tensorboard is False
    path.write_text("train:\n- {src_lang: en, tgt_lang: no, source: a, target: b}\n")
    assert TrainConfig.from_dict(load_yaml(path)).train[0].name == "en-no"
    for values in (
        {"train": ["a", "b"], "src_lang": False, "tgt_lang": "de"},
        {"train": [{"src_lang": False, "tgt_lang": "de", "source": "a", "target": "b"}]},
    ):
        with pytest.raises(InputError, match="src_lang False: expected a language's code, in quotes"):
            TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    "content",
    ["steps: 1\nsteps: 2\n", "batch-tokens: 1\nbatch_tokens: 2\n", "method_args: {rank: 1, rank: 2}\n"],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match="key '[a-z_]+' twice") as error:
        load_yaml(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(InputError, match="batch-tokens and batch_tokens: one option, given twice"):
        TrainConfig.from_dict({"batch-tokens": 1, "batch_tokens": 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 4000}, "vocab_size 4000: no effect on a model that exists"),
        ({"heads": 4}, "heads 4: no effect on a model that exists"),
        ({"vocab_text": ["a"]}, "vocab_text .* no effect on a model that exists"),
        ({"allow": ["quantized"]}, "allow: no effect without a budget"),
        ({"tier": 2, "plan": "p", "memory": "1GiB"}, "tier 2: no effect, since the plan has its own tiers"),
        ({"method": "full", "params": "10%"}, "params 10%: no effect, since all of the model is trained"),
        ({"model": "new", "params": "10%"}, "params 10%: no effect"),
    ],
)
def test_options_without_effect_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**{"model": "some/model", **values}).check_settings()


def test_languages_beside_pairs_that_have_theirs():
    with pytest.raises(InputError, match="src_lang 'fr': no effect, since every pair names its own"):
        from_flags("--pair", "en-de", "a", "b", "--src-lang", "fr")


def test_a_model_is_adapted_by_a_method_alone():
    """A configuration that is not resolved, or a file of which the method was taken out, names none."""
    with pytest.raises(InputError, match="method None: unknown; expected .*adapter"):
        adapt(nn.Linear(2, 2), TrainConfig())
