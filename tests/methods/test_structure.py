from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import M2M100Config, M2M100ForConditionalGeneration, MBartConfig, MBartForConditionalGeneration

from petl_kernels.errors import InputError
from petl_kernels.methods import Adapter, BitFit, CrossAttention, LayerNormTuning, LoRA, describe, total_parameters
from petl_kernels.methods.targets import find_targets
from petl_kernels.models.structure import norms

from .models import build

LINEAR = (nn.Linear,)


def test_describes_every_family(model, family):
    structure = describe(model)
    assert structure.family == ("t5" if family == "t5" else "bart")
    assert structure.pre_norm == (family != "marian")
    assert structure.d_model == 32
    assert [layer.side for layer in structure.layers] == ["encoder"] * 2 + ["decoder"] * 2
    assert [attention.kind for attention in structure.attentions] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    for attention in structure.attentions:
        q = model.get_submodule(attention.q)
        assert q.out_features == attention.heads * attention.head_dim == (36 if family == "t5" else 32)
        assert hasattr(model.get_submodule(attention.norm), "weight")
    for layer in structure.layers:
        assert len(layer.ffn.inputs) == (2 if family == "t5" else 1)
        assert model.get_submodule(layer.ffn.out).in_features == model.get_submodule(layer.ffn.inputs[0]).out_features
    # every linear inside the layers is listed, once
    inside = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"]
    assert sorted(structure.linears) == sorted(inside)


def test_describes_the_model_without_its_head(model):
    inner = getattr(model, "model", None)
    if inner is not None:
        assert len(describe(inner).layers) == 4


def test_refuses_other_models():
    with pytest.raises(InputError, match="model Sequential: expected an encoder-decoder"):
        describe(nn.Sequential(nn.Linear(3, 3)))


def test_norms(model, family):
    expected = {"m2m100": 2 * 2 + 2 * 3 + 2, "mbart": 2 * 2 + 2 * 3 + 4, "marian": 2 * 2 + 2 * 3, "t5": 12}
    assert len(norms(model)) == expected[family]


def test_total_counts_tied_parameters_once(model):
    assert total_parameters(model) == model.num_parameters()
    assert total_parameters(model) < sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))


@pytest.fixture
def m2m100():
    return build("m2m100")


def test_targets_by_name_path_and_expression(m2m100):
    assert len(find_targets(m2m100, ("q_proj",), LINEAR, "lora")) == 6
    assert find_targets(m2m100, ("encoder.layers.1.fc1",), LINEAR, "lora") == ["model.encoder.layers.1.fc1"]
    assert len(find_targets(m2m100, r".*decoder.*\.(q|v)_proj", LINEAR, "lora")) == 8
    assert len(find_targets(m2m100, "all-linear", LINEAR, "lora")) == 6 * 4 + 4 * 2
    in_order = find_targets(m2m100, ("v_proj", "q_proj"), LINEAR, "lora")
    assert in_order == [path for path, _ in m2m100.named_modules() if path.endswith(("q_proj", "v_proj"))]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), r"lora target 'q_prj': matches no module of M2M100.*; near: .*q_proj"),
        (("q_proj", "SelfAttention.q"), "lora target 'SelfAttention.q': matches no module .* near: "),
        (("self_attn",), "lora target 'model.encoder.layers.0.self_attn': a M2M100Attention, expected Linear"),
        (".*query", r"lora target '\.\*query': matches no module"),
        ("(", r"lora target '\(': not a regular expression"),
    ],
)
def test_refuses_targets(m2m100, targets, message):
    with pytest.raises(InputError, match=message) as error:
        find_targets(m2m100, targets, LINEAR, "lora")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("mbart-large-50", {"total": 610.9, 1024: 8.3, "cross": 8.25, "bias": 0.055}),
        ("m2m100_418M", {"total": 483.9, 1024: 10.4, "cross": 10.42, "bias": 0.069}),
        ("nllb-200-3.3B", {"total": 3344.9, 1024: 6.0, "cross": 12.05, "bias": 0.040}),
    ],
)
def test_shares_of_the_published_models(name, shares):
    with torch.device("meta"):
        if name.startswith("mbart"):
            model = MBartForConditionalGeneration(MBartConfig(vocab_size=250054))
        elif name.startswith("m2m100"):
            model = M2M100ForConditionalGeneration(M2M100Config(vocab_size=128112))
        else:
            wide = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 8192)
            deep = dict.fromkeys(("encoder_layers", "decoder_layers"), 24)
            model = M2M100ForConditionalGeneration(M2M100Config(vocab_size=256206, d_model=2048, **wide, **deep))
    total = total_parameters(model)

    def percent(config) -> float:
        return 100 * config.count(model) / total

    assert total / 1e6 == pytest.approx(shares["total"], abs=0.05)
    assert percent(Adapter(1024)) == pytest.approx(shares[1024], abs=0.05)
    assert percent(CrossAttention()) == pytest.approx(shares["cross"], abs=0.005)
    assert percent(BitFit(layer_norm=False)) == pytest.approx(shares["bias"], abs=0.0005)
    assert percent(LayerNormTuning()) == pytest.approx(0.02, abs=0.0075)
    assert 0.14 <= percent(LoRA(rank=8)) <= 0.245


@pytest.mark.slow
def test_needs_no_transformers():
    code = "import sys; sys.modules['transformers'] = None; import petl_kernels.api, petl_kernels.nn; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr
