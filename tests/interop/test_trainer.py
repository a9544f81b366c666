"""transformers' Trainer and ``save_pretrained`` with adapted models: what is written comes back bit for bit."""

from __future__ import annotations

import copy
import importlib
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from methods.models import batch, build, logits, train_a_little
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import petl_kernels as pk
from petl_kernels import InputError
from petl_kernels.integrations import _AfterImport
from petl_kernels.methods import METHODS
from petl_kernels.weights.quantized import quantize_model

SETTINGS = {"lora": {"rank": 2}, "adapter": {"bottleneck": 3}, "prefix": {"length": 2}}
CASES = [  # a family and a method of each kind: pieces, base tensors, added tensors, another form than is stored
    ("m2m100", "lora"),
    ("t5", "bitfit"),
    ("mbart", "full"),
    ("marian", "prefix"),
    ("m2m100", "parallel"),
]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()


def config_of(method):
    return METHODS[method](**SETTINGS.get(method, {}))


def rows(model):
    inputs = batch(model, rows=4)
    target = inputs.pop("decoder_input_ids")
    return [{"labels": target[i], **{key: tensor[i] for key, tensor in inputs.items()}} for i in range(4)]


def trainer_of(model, steps, **settings):
    settings = {"save_steps": 2, "learning_rate": 0.02, "lr_scheduler_type": "constant", **settings}
    arguments = Seq2SeqTrainingArguments(
        "out",
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )
    return Seq2SeqTrainer(model, arguments, train_dataset=rows(model), eval_dataset=rows(model))


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_resumed_run_is_the_run_that_was_not_stopped(family, method, caplog):
    model = pk.adapt(build(family), config_of(method))
    start = values(model)
    trainer_of(model, 4).train()
    again = pk.adapt(build(family), config_of(method))
    torch.manual_seed(3)  # other start values than those that were trained
    with torch.no_grad():
        [parameter.add_(torch.randn_like(parameter)) for parameter in pk.trainable_parameters(again)]
    with caplog.at_level(logging.WARNING, logger="transformers"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="load_state_dict")
        trainer_of(again, 4).train(resume_from_checkpoint="out/checkpoint-2")
    same(values(again), values(model))
    assert any(not torch.equal(start[name], tensor) for name, tensor in values(model).items() if name in start)
    plain = build(family)
    assert torch.equal(logits(pk.use_adapter(again, None)), logits(plain))  # the base, too
    assert not [line for line in caplog.messages if "petl" in line or "lora" in line]


@pytest.mark.parametrize("spreading", ["fsdp", "deepspeed"])
def test_a_model_spread_over_devices_is_refused(spreading, monkeypatch):
    make = Seq2SeqTrainer.create_accelerator_and_postprocess

    def create(self):
        make(self)
        setattr(self, f"is_{spreading}_enabled", True)

    model = build("m2m100")
    trainer_of(model, 1)
    pk.adapt(model, pk.LoRA(rank=2), "mine")
    trainer_of(model, 1)
    monkeypatch.setattr(Seq2SeqTrainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(InputError, match=rf"(?i)Trainer with {spreading}: the model has the adapter 'mine'"):
        trainer_of(model, 1)


def test_the_best_model_is_there_at_the_end():
    model = pk.adapt(build("m2m100"), pk.LoRA(rank=2))
    settings = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "load_best_model_at_end": True}
    trainer = trainer_of(model, 4, learning_rate=0.8, metric_for_best_model="loss", greater_is_better=True, **settings)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == max(losses) != losses[-1]


def test_all_named_adapters_are_in_a_checkpoint():
    def make():
        model = pk.adapt(build("mbart"), pk.LoRA(rank=2), "one")
        return pk.adapt(pk.adapt(model, pk.BitFit(), "two"), pk.IA3(), "three")

    model = make()
    train_a_little(pk.use_adapter(model, "two"))
    train_a_little(pk.use_adapter(model, "one"))
    trainer_of(model, 2, save_only_model=True).train()
    again = pk.use_adapter(make(), "one")
    trainer_of(again, 2)._load_from_checkpoint("out/checkpoint-2")
    assert again.petl.active == "one"
    for name in ("one", "two", "three", None):
        assert torch.equal(logits(pk.use_adapter(again, name).eval()), logits(pk.use_adapter(model, name).eval()))


def test_a_checkpoint_in_several_files(caplog):
    model = pk.adapt(build("m2m100"), pk.BitFit())
    train_a_little(model)
    model.save_pretrained("sharded", max_shard_size="20KB")
    again = pk.adapt(build("m2m100"), pk.BitFit())
    with caplog.at_level(logging.WARNING, logger="transformers"):
        trainer_of(again, 2)._load_from_checkpoint("sharded")
    same(values(again), values(model))


def test_modules_are_wrapped_after_they_are_imported(monkeypatch):
    Path("petl_imported_later.py").write_text("import os\nassert 'PETL_FAIL' not in os.environ\nvalue = 1\n")
    seen = []
    monkeypatch.syspath_prepend(".")
    monkeypatch.setattr(sys, "meta_path", [_AfterImport({"petl_imported_later": seen.append}), *sys.meta_path])
    monkeypatch.setenv("PETL_FAIL", "1")
    with pytest.raises(AssertionError):
        importlib.import_module("petl_imported_later")
    monkeypatch.delenv("PETL_FAIL")
    module = importlib.import_module("petl_imported_later")
    assert seen == [module] and module.value == 1
    again = []
    _AfterImport({"petl_imported_later": again.append})  # when it is there already
    assert again == [module]
    del sys.modules["petl_imported_later"]


def test_checkpoints_that_do_not_fit_are_refused():
    def refused(model, *words):
        with pytest.raises(InputError) as error:
            trainer_of(model, 4).train(resume_from_checkpoint="out/checkpoint-2")
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value

    trainer_of(pk.adapt(build("t5"), pk.LoRA(rank=2, alpha=4)), 2).train()
    refused(build("t5"), "'default'", "has none")
    refused(pk.adapt(build("t5"), pk.LoRA(rank=2, alpha=4), "mine"), "no adapter 'mine'", "'default'")
    refused(pk.adapt(build("t5"), pk.LoRA(rank=2, alpha=8)), "scale", "2.0", "4.0")
    refused(pk.adapt(build("t5"), pk.IA3()), "default")


def test_no_name_to_load_checkpoints_is_said(monkeypatch):
    from petl_kernels.integrations import trainer

    class Module:
        class Trainer:
            pass

    with pytest.warns(UserWarning, match=r"has no Trainer._load_from_checkpoint.*pk.load_adapter"):
        trainer.wrap(Module)


# -- save_pretrained ------------------------------------------------------------------------------------------------


def loaded(kind, folder, caplog):
    """The model that ``from_pretrained`` makes, which must not have anything to say."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = kind.from_pretrained(folder).eval()
    assert not caplog.messages
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_and_its_adapter_come_back(method, caplog):
    family = "t5" if method == "bitfit" else "m2m100"
    plain = build(family)
    model = pk.adapt(copy.deepcopy(plain), config_of(method))
    train_a_little(model)
    model.save_pretrained("saved")
    again = loaded(type(plain), "saved", caplog)
    assert torch.equal(logits(again), logits(plain))
    same({name: again.state_dict()[name] for name in plain.state_dict()}, plain.state_dict())
    assert torch.equal(logits(pk.load_adapter(again, "saved")), logits(model))
    pk.save_adapter(model, "saved")  # beside the model, where from_pretrained does not take it for PEFT's
    assert torch.equal(logits(loaded(type(plain), "saved", caplog)), logits(plain))


def test_a_given_state_is_the_base_too(caplog):
    """As accelerate's users save: ``save_pretrained(folder, state_dict=accelerator.get_state_dict(model))``."""
    plain = build("mbart")
    model = pk.adapt(copy.deepcopy(plain), pk.BitFit())
    train_a_little(model)
    model.save_pretrained("saved", state_dict={name: tensor.half() for name, tensor in model.state_dict().items()})
    assert torch.equal(logits(loaded(type(plain), "saved", caplog).float()), logits(plain.half().float()))
    with pytest.raises(InputError, match="whole model"):
        model.save_pretrained("saved", state_dict={name: t.flatten()[:0] for name, t in model.state_dict().items()})
    with pytest.raises(InputError, match="push_to_hub"):
        model.save_pretrained("saved", push_to_hub=True)


def test_a_merged_model_is_saved_as_the_plain_model_that_it_is(caplog):
    model = pk.adapt(build("m2m100"), pk.LoRA(rank=2, targets=("embed_tokens", "lm_head", "q_proj")), "one")
    train_a_little(model)
    adapted = logits(model)
    pk.merge(model).save_pretrained("saved")
    torch.testing.assert_close(logits(loaded(type(model), "saved", caplog)), adapted)
    with pytest.raises(InputError, match="holds no adapter"):
        pk.load_adapter(build("m2m100"), "saved")
    pk.adapt(pk.unmerge(model), pk.IA3(), "two")
    pk.merge(pk.use_adapter(model, "one"))
    with pytest.warns(UserWarning, match="'one' is merged and saved, two not"):
        model.save_pretrained("saved")


def test_a_quantized_base_is_saved_with_the_values_that_it_stands_for(caplog):
    model = build("m2m100")
    quantize_model(model.requires_grad_(False), "int8")
    train_a_little(pk.adapt(model, pk.LoRA(rank=2)))
    model.save_pretrained("saved")
    torch.testing.assert_close(logits(pk.load_adapter(loaded(type(model), "saved", caplog), "saved")), logits(model))
    assert all(tensor.is_floating_point() for tensor in load_file("saved/model.safetensors").values())
