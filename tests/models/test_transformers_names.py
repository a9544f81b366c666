"""Names that transformers does not promise: each is there, or what its function says happens."""

from __future__ import annotations

import pytest
import torch
import transformers
from interop import conftest as checkpoints
from layers.lean_cases import adapted, ragged, step, worst
from methods.models import FAMILIES, batch, build, logits

import petl_kernels as pk
from petl_kernels import InputError
from petl_kernels.layers import device_masks
from petl_kernels.layers.lean import layer_states
from petl_kernels.models import transformers_names as names
from petl_kernels.planning import simulate
from petl_kernels.planning.beam_search import Search


def tiers(model) -> set[int]:
    return {state.tier for state in layer_states(model)}


def reasons(model) -> set[str]:
    return {state.reason for state in layer_states(model)}


def translations(model) -> torch.Tensor:
    inputs = batch(model)
    del inputs["decoder_input_ids"]
    return model.generate(**inputs, num_beams=3, do_sample=False, max_length=None, max_new_tokens=9)


make, tokenizers = checkpoints.make, checkpoints.tokenizers  # fixtures


def test_code_of_a_package_with_a_longer_name_is_not_transformers():
    for name, path in (("transformers", ""), ("transformers_fork", "_fork")):
        file = f"{names._roots()[1].rstrip('/')}{path}/modeling.py"
        made = {}
        exec(compile("class T5Block:\n    def forward(self):\n        pass", file, "exec"), made)
        assert names.class_of(made["T5Block"].forward) == ("T5Block" if name == "transformers" else "")


def test_code_of_pytorch_is_known_without_transformers(monkeypatch):
    find = names.importlib.util.find_spec
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    monkeypatch.setattr(names, "_roots", names._roots.__wrapped__)
    assert len(names._roots()) == 1
    assert names.class_of.__wrapped__(torch.nn.Linear.forward) == "Linear"


@pytest.mark.parametrize("family", (*FAMILIES, "umt5", "seamless"))
def test_lean_layers_let_a_cache_through_under_any_keyword(family):
    """``past_key_values`` up to 5.23, ``cache`` since. Without its cache a layer would take each word for the first."""
    model = build(family)
    plain = translations(model)
    pk.lean(model, 1)
    seen = []
    layer = type(model.get_submodule(layer_states(model)[-1].path))
    steps_aside = layer.steps_aside
    layer.steps_aside = lambda self, kwargs: seen.append(steps_aside(self, kwargs)) or seen[-1]
    try:
        found = translations(model)
    finally:
        del layer.steps_aside
    assert torch.equal(found, plain) and any(seen)


def test_a_cache_is_found_by_what_it_is():
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    others = {"input_ids": torch.ones(1), "use_cache": True, "encoder_outputs": {}, "limit": 3, "none": None}
    assert names.cache_in(others) is None
    for keyword in ("past_key_values", "cache", "a_name_to_come"):
        assert names.cache_in({**others, keyword: cache}) is cache


def test_without_its_layers_a_cache_is_told_in_one_line(monkeypatch):
    with torch.device("meta"):
        model = build("m2m100")
    monkeypatch.setattr(names, "_PLAIN", (object,))  # no cache is found
    with pytest.raises(InputError, match=r"^transformers [\d.]+ has no self_attention_cache of NoneType: .*--memory"):
        Search(model, 2, 1, None).peak(2, 5, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_attention_implementation_layers_run_as_they_are(family, monkeypatch):
    model = pk.lean(adapted(family, "lora"), 2)
    inputs = ragged(model)
    assert tiers(model) == {2}
    plain = step(model, inputs)
    monkeypatch.setattr("petl_kernels.layers.obstacles.attention_implementation", lambda config: None)
    monkeypatch.setattr(device_masks, "attention_implementation", lambda config: None)
    monkeypatch.setattr(device_masks, "WAITED_FOR", ("cpu",))
    assert reasons(model) == {"attention implementation None, expected eager or sdpa"}
    difference, name = worst(step(model, inputs), plain)
    assert difference < 1e-9, (name, difference)
    monkeypatch.setattr("petl_kernels.methods.prefix.attention_implementation", lambda config: None)
    with pytest.raises(InputError, match="prefix: attention implementation None"):
        pk.adapt(build(family), pk.PrefixTuning(3))


def test_without_masks_to_register_a_prefix_is_refused(monkeypatch):
    from transformers import masking_utils

    monkeypatch.delattr(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS")
    with pytest.raises(InputError, match=r"^transformers [\d.]+ has no masks .*: prefix-tuning cannot work with it$"):
        pk.adapt(build("m2m100"), pk.PrefixTuning(3))


def test_without_an_attention_function_a_prefix_is_refused():
    own = build("m2m100").get_encoder().layers[0].self_attn
    assert callable(names.attention_function("eager", own)) and callable(names.attention_function("sdpa", own))
    for name, module in (("eager", torch.nn.Linear(1, 1)), ("sdpb", own)):
        with pytest.raises(InputError, match=f"has no {name} attention function for .*: prefix-tuning cannot"):
            names.attention_function(name, module)


READ = [
    *(("m2m100", "", name) for name in names.BART_LAYER),
    *(("m2m100", "self_attn", name) for name in names.PROJECTED_ATTENTION),
    *(("t5", "layer.0.SelfAttention", name) for name in names.T5_ATTENTION if name != "compute_bias"),  # a method
    *(("t5", "layer.-1.DenseReluDense", name) for name in names.T5_FEED_FORWARD),
]


@pytest.mark.parametrize(("family", "path", "name"), READ)
def test_a_layer_without_what_is_read_stays_plain(family, path, name):
    model = build(family)
    for state in layer_states(model):
        layer = model.get_submodule(state.path)
        part = layer.get_submodule(path.replace("-1", str(len(getattr(layer, "layer", ())) - 1)))
        delattr(part, name)
    pk.lean(model, 1)
    assert tiers(model) == {0} and all(reason.endswith(f"has no {name}") for reason in reasons(model))


@pytest.mark.parametrize(("family", "name"), [("m2m100", "num_heads"), ("t5", "n_heads"), ("t5", "key_value_proj_dim")])
def test_without_its_numbers_of_heads_a_model_is_left_as_it_is(family, name):
    model = build(family)
    plain = logits(model)
    first = model.get_submodule(layer_states(model)[0].path)
    delattr(first.layer[0].SelfAttention if family == "t5" else first.self_attn, name)
    with pytest.raises(InputError, match="no number of heads of .*Attention: methods and lean layers"):
        pk.adapt(model, pk.PrefixTuning(3))
    pk.lean(model, 1)
    assert tiers(model) == {0} and "no number of heads" in next(iter(reasons(model)))
    if name == "key_value_proj_dim" or family == "m2m100":
        return  # which the model's own forward reads
    torch.testing.assert_close(logits(model), plain)


def test_an_activation_of_another_name_leaves_layers_plain(monkeypatch):
    model = build("m2m100")
    for name in ("ReLU", "GELUActivation"):
        monkeypatch.delitem(names.ACTIVATIONS, name)
    pk.lean(model, 1)
    assert tiers(model) == {0} and all(reason.startswith("activation ") for reason in reasons(model))


def test_a_model_is_made_without_from_config():
    class Plain(torch.nn.Linear):
        def __init__(self, config):
            super().__init__(config, 2)

    assert names.model_of(Plain, 3, torch.float64).weight.dtype == torch.float64
    config = build("m2m100").config
    made = names.model_of(transformers.M2M100ForConditionalGeneration, config, torch.bfloat16)
    assert made.dtype == torch.bfloat16 and names.attention_implementation(made.config) == "sdpa"


def test_without_a_rule_for_decoder_inputs_they_are_expected(monkeypatch):
    model = pk.lean(build("m2m100"), 1)
    inputs = batch(model)
    labels = inputs.pop("decoder_input_ids")
    assert model(**inputs, labels=labels).loss > 0
    monkeypatch.delattr(transformers.models.m2m_100.modeling_m2m_100, "shift_tokens_right")
    model.lm_head.register_forward_hook(lambda *_: None)  # so that smoothing needs logits without labels
    with pytest.raises(InputError, match="no rule to make decoder inputs from labels; expected decoder_input_ids"):
        model(**inputs, labels=labels, label_smoothing=0.1)


def test_a_subclass_in_a_file_that_has_another_familys_rule(monkeypatch):
    from transformers.models.bart.modeling_bart import shift_tokens_right

    monkeypatch.setitem(globals(), "shift_tokens_right", shift_tokens_right)

    class Own(transformers.MBartForConditionalGeneration):
        pass

    model = Own(build("mbart").config)
    labels = batch(model)["decoder_input_ids"]
    assert torch.equal(names.decoder_inputs(model, labels), names.decoder_inputs(build("mbart"), labels))
    assert names.decoder_inputs(model, labels)[0, 0] == labels[0, -1]


def test_without_a_cache_in_the_output_a_loss_is_refused():
    with pytest.raises(InputError, match="has no cache in int: a loss without logits cannot work with it"):
        names.cache_field(int)


def test_layers_are_dropped_by_no_number():
    """On fake tensors a number that is drawn has no value to compare."""
    model = build("m2m100", encoder_layerdrop=0.9, decoder_layerdrop=0.9).train()
    names.drop_no_layer(model)
    assert torch.equal(logits(model), logits(model.eval()))
    with simulate.fake_mode():
        simulate.shallow(model, 1, 1)(**{name: torch.ones_like(value) for name, value in batch(model).items()})


def test_without_its_ids_a_tokenizer_makes_no_new_model(make):
    tokenizer = make("m2m100")[1]
    assert names.rows_of_m2m100(tokenizer) == 1 + max(tokenizer.lang_token_to_id.values())
    with pytest.raises(InputError, match="has no encoder of object: a new model cannot work with it"):
        names.rows_of_m2m100(object())


def test_a_tokenizer_without_its_pieces_gives_the_same_ids(make, monkeypatch):
    from petl_kernels.interop import languages

    for family in ("m2m100", "marian"):
        model, tokenizer = make(family)
        pair = languages.LanguagePair(model, tokenizer, "en", "de")
        fast = pair.encode_source(["a house runs", "big red tree"])
        monkeypatch.setattr(languages, "pieces_of", lambda tokenizer, target: None)
        assert pair.encode_source(["a house runs", "big red tree"]) == fast
        monkeypatch.undo()
