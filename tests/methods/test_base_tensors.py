"""Methods that train tensors of the base: full fine-tuning, BitFit, cross-attention, LayerNorms."""

from __future__ import annotations

import pytest
import torch

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS, adapter_state, total_parameters

from .models import build, logits, train_a_little

KEYS = ("full", "bitfit", "bitfit-biases", "cross-attention", "ln")


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_trains_tied_parameters_once(model, family):
    everything = {name for name, _ in model.named_parameters()}
    pk.adapt(model, pk.FullFineTuning())
    assert everything - trained_names(model) == (
        {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")} if family == "marian" else set()
    )
    assert sum("shared" in name or "lm_head" in name for name in adapter_state(model, "default")) == 1
    train_a_little(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_bitfit_trains_biases_and_with_norms_their_weights(model, family):
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    pk.adapt(model, pk.BitFit(layer_norm=False), name="biases")
    linears = {f"{path}.bias" for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head.bias"}
    assert trained_names(model) == biases | linears
    assert (family == "t5") == (not biases)
    pk.adapt(model, pk.BitFit(), name="both")
    more = trained_names(model) - biases - linears
    assert more == {f"{path}.weight" for path, m in model.named_modules() if "LayerNorm" in type(m).__name__}


def test_bitfit_leaves_no_bias_behind_on_t5():
    model = build("t5")
    names = list(model.state_dict())
    pk.adapt(model, pk.BitFit())
    assert len(model.state_dict()) > len(names)
    added = model.encoder.block[0].layer[0].SelfAttention.q.bias
    pk.use_adapter(model, None)
    assert [key for key in model.state_dict() if not key.startswith("petl_aside.")] == names  # beside the model
    pk.use_adapter(model, "default")
    assert model.encoder.block[0].layer[0].SelfAttention.q.bias is added  # what an optimiser holds
    with pytest.raises(InputError, match="adapter 'default': T5ForConditionalGeneration has no biases that could hold"):
        pk.merge(model)


def test_cross_attention_trains_its_block_and_norm(model, family):
    pk.adapt(model, pk.CrossAttention())
    names = trained_names(model)
    assert names and all("decoder" in name for name in names)
    if family == "t5":
        assert all(".layer.1." in name for name in names) and len(names) == 2 * 5
    else:
        assert all(".encoder_attn" in name for name in names) and len(names) == 2 * 10


def test_layer_norms_by_target(model, family):
    name = "layer_norm" if family == "t5" else "final_layer_norm"
    pk.adapt(model, pk.LayerNormTuning(targets=(name,)))
    assert all(f"{name}." in where for where in trained_names(model))
    with pytest.raises(InputError, match="ln target 'fc9': matches no module"):
        pk.adapt(model, pk.LayerNormTuning(targets=("fc9",)), name="b")


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_several_on_one_model_keep_apart(model, key):
    base = logits(model)
    pk.adapt(model, METHODS[key](), name="a")
    train_a_little(model)
    a = logits(model)
    pk.adapt(model, METHODS[key](), name="b")
    assert torch.equal(logits(model), base)  # a new adapter starts from the base
    train_a_little(model, steps=3)
    b = logits(model)
    pk.adapt(model, pk.LoRA(rank=3), name="c")
    assert torch.equal(logits(model), base)
    for name, expected in (("a", a), ("b", b), (None, base), ("b", b), ("a", a), ("c", base)):
        pk.use_adapter(model, name)
        assert torch.equal(logits(model), expected), name


def test_optimiser_keeps_its_parameters_across_switching(model):
    pk.adapt(model, pk.CrossAttention())
    before = pk.trainable_parameters(model)
    pk.use_adapter(model, None)
    pk.use_adapter(model, "default")
    assert all(a is b for a, b in zip(before, pk.trainable_parameters(model), strict=True))


@pytest.mark.parametrize("key", KEYS)
def test_merging_changes_nothing(key, tmp_path):
    model = pk.adapt(build("mbart"), METHODS[key]())
    train_a_little(model)
    adapted = logits(model)
    pk.merge(model)
    assert torch.equal(logits(model), adapted)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), adapted)
    pk.unmerge(model)
    assert torch.equal(logits(model), adapted) and pk.trainable_parameters(model)


def test_share_of_full_is_everything():
    model = build("m2m100")
    assert pk.FullFineTuning().count(model) == total_parameters(model)
    assert pk.report(pk.adapt(model, pk.FullFineTuning())).frozen == 0
