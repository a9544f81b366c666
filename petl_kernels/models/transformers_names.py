"""Names of transformers that it does not promise to keep: each in one place, with what happens when it is gone.

What is public there is used where it is needed: model classes, ``generate``, ``from_pretrained``, fields of
configurations, and the names of modules that hold parameters, since checkpoints are made of those.
Where nothing can stand in for a name, ``gone`` makes one line of it. The module needs PyTorch alone until a
function is called.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError

# Class names of activation modules: the ops' names for them. A class that is none of these leaves its layers plain, and
# ``pk.report`` names it.
ACTIVATIONS = {
    "ReLU": "relu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}

# Prefixes of the classes whose ``forward`` lean layers have been compared with, formula by formula: "Bart" stands for
# BartEncoderLayer, BartDecoderLayer and BartAttention. A layer that runs another ``forward`` stays plain, and
# ``pk.report`` names that.
BART_NAMES = (
    "Bart", "Blenderbot", "BlenderbotSmall", "M2M100", "MBart", "Marian", "PLBart", "Pegasus", "PegasusX",
    "Speech2Text", "Whisper",
)  # fmt: skip
# T5_NAMES: the first layer of a stack makes a position bias for all. UMT5_NAMES: each layer makes its own.
T5_NAMES = ("MT5", "T5")
UMT5_NAMES = ("UMT5",)
M4T_NAMES = ("SeamlessM4T", "SeamlessM4Tv2")
NLLB_MOE_NAMES = ("NllbMoe",)
T5GEMMA_NAMES = ("T5Gemma",)

# Attributes that lean layers read of a layer and of its attentions, beside modules with parameters. A layer without one
# of these stays plain, and ``pk.report`` names it (``lacking``).
BART_LAYER = ("dropout", "activation_fn", "activation_dropout")
PROJECTED_ATTENTION = ("scaling", "is_causal", "dropout")  # of the BART family, SeamlessM4T and NLLB-MoE
T5_ATTENTION = (
    "is_causal", "dropout", "has_relative_attention_bias", "relative_attention_max_distance", "compute_bias",
)  # fmt: skip
T5_FEED_FORWARD = ("act", "dropout")
M4T_NETWORK = ("act", "dropout")
T5GEMMA_LAYER = ("dropout", "mlp")
T5GEMMA_ATTENTION = ("scaling", "head_dim", "attention_dropout", "attn_logit_softcapping", "layer_idx")
T5GEMMA_NETWORK = ("act_fn", "dropout")

# Classes of norms that multiply by 1 + weight, in fp32, and return their input's dtype.
OFFSET_NORMS = ("T5GemmaRMSNorm",)

# Classes of position embeddings whose ``forward`` is known: it looks up, for each token, the row of its place in its
# sentence in ``weight`` (behind ``offset`` rows), or as M2M-100 in ``weights``, where padding has a row of its own.
# ``STACKS`` below are stacks of layers that treat every token alone, apart from positions and layers. A model with
# others reads no packed rows.
POSITIONS = frozenset(
    (
        "BartLearnedPositionalEmbedding",
        "BlenderbotLearnedPositionalEmbedding",
        "BlenderbotSmallLearnedPositionalEmbedding",
        "M2M100SinusoidalPositionalEmbedding",
        "MBartLearnedPositionalEmbedding",
        "MarianSinusoidalPositionalEmbedding",
        "PLBartLearnedPositionalEmbedding",
        "PegasusSinusoidalPositionalEmbedding",
        "SeamlessM4TSinusoidalPositionalEmbedding",
        "SeamlessM4Tv2SinusoidalPositionalEmbedding",
    )
)


def of(prefixes: Iterable[str], *endings: str) -> frozenset[str]:
    """Returns the names of classes that begin with one of ``prefixes`` and end with one of ``endings``."""
    return frozenset(prefix + ending for prefix in prefixes for ending in endings)


STACKS = of((*BART_NAMES, *M4T_NAMES), "Encoder", "Decoder") | of((*T5_NAMES, *UMT5_NAMES), "Stack")


def activation_name(module: nn.Module) -> str:
    """Returns the ops' name for an activation; empty for one that they do not have."""
    name = type(module).__name__
    if name == "GELU" and module.approximate != "none":
        name = "GELUTanh"
    return ACTIVATIONS.get(name, "")


def unknown_activation(module: nn.Module) -> str:
    """Returns a reason why an activation cannot be read; "" for one that the ops have."""
    return "" if activation_name(module) else f"activation {type(module).__name__}"


def activation_of(layer: Any) -> str:
    """Returns the ops' name for the activation of an encoder or decoder layer; "" for one that they do not have."""
    if hasattr(layer, "ffn"):
        return activation_name(layer.ffn.act)
    if hasattr(layer, "mlp"):
        return activation_name(layer.mlp.act_fn)
    function = getattr(layer, "activation_fn", None) or layer.layer[-1].DenseReluDense.act
    return activation_name(function)


def feed_forward_norm(layer: nn.Module) -> str:
    """Returns the name of the norm before ``layer.ffn``: SeamlessM4T's, or NLLB-MoE's."""
    return "ffn_layer_norm" if hasattr(layer, "ffn_layer_norm") else "ff_layer_norm"


def has_experts(layer: Any) -> bool:
    """Returns whether the feed-forward network of a layer with ``ffn`` is a router with experts (NLLB-MoE)."""
    return hasattr(layer.ffn, "experts")


def class_that_runs(module: nn.Module) -> str:
    """Returns the class whose ``forward`` a call of ``module`` runs, as PyTorch or transformers have written it.

    Empty where somebody has put another function there, in the module, its class or a subclass.
    """
    return "" if "forward" in module.__dict__ else class_of(type(module).forward)


@functools.cache
def class_of(forward: Callable) -> str:
    """Returns the class in which PyTorch or transformers define ``forward``; empty for code of others."""
    code = getattr(forward, "__code__", None)
    if code is None or not code.co_filename.startswith(_roots()):
        return ""
    return forward.__qualname__.rpartition(".")[0]


@functools.cache
def _roots() -> tuple[str, ...]:
    specs = (importlib.util.find_spec(name) for name in ("torch", "transformers"))
    files = (spec.origin for spec in specs if spec is not None and spec.origin is not None)
    return tuple(f"{Path(file).parent}{os.sep}" for file in files)


def gone(name: str, what: str) -> InputError:
    """Returns the error of a name that the installed transformers has not, and that ``what`` cannot do without."""
    return InputError(f"transformers {metadata.version('transformers')} has no {name}: {what} cannot work with it")


def kept_in_fp32(model: Any, path: str) -> bool:
    """Returns whether transformers keeps the module or parameter at ``path`` in fp32 where ``model`` is in fp16."""
    return not set(getattr(model, "_keep_in_fp32_modules", None) or ()).isdisjoint(path.split("."))


_OTHER_DROPOUTS = re.compile(r".*\.(ffn?_dropout|token_dropout|(ffn|expert_\d+)\.dropout)")


def is_activation_dropout(path: str) -> bool:
    """Returns whether the module at ``path`` is a dropout of NLLB-MoE or SeamlessM4T with a rate of its own, not the
    config's ``dropout``."""
    return _OTHER_DROPOUTS.fullmatch(path) is not None


def lacking(module: nn.Module, names: Iterable[str]) -> str:
    """Returns a reason why ``module`` cannot be read; empty when it has every one of ``names``."""
    found = [name for name in names if not hasattr(module, name)]
    return f"{type(module).__name__} has no {found[0]}" if found else ""


# ---- attention ------------------------------------------------------------------------------------------------------


def attention_implementation(config: Any) -> str | None:
    """Returns the attention function that a model runs, by its name: "eager", "sdpa".

    If it is gone, returns None: lean layers step aside for the model's own, masks stay as they are, and a prefix is
    refused.
    """
    return getattr(config, "_attn_implementation", None)


def heads_of(attention: Any) -> tuple[int, int]:
    """Returns (heads, head_dim) of an attention's keys: BART's family names them otherwise than T5's, and T5Gemma has
    fewer of them than of queries.

    If they are gone, raises InputError: what needs the structure of a model refuses it, and ``pk.lean`` leaves it as it
    is.
    """
    for heads, head_dim in (("num_heads", "head_dim"), ("n_heads", "key_value_proj_dim")):
        if hasattr(attention, heads) and hasattr(attention, head_dim):
            return getattr(attention, heads), getattr(attention, head_dim)
    if hasattr(attention, "num_key_value_groups") and hasattr(attention, "head_dim"):
        return attention.config.num_key_value_heads, attention.head_dim
    raise gone(f"number of heads of {type(attention).__name__}", "methods and lean layers")


def register_attention(name: str, function: Callable, like: str) -> None:
    """Makes ``name`` an attention function of transformers, with the masks of its own function ``like``.

    If it is gone, raises InputError: prefix-tuning alone needs it.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        masks = ALL_MASK_ATTENTION_FUNCTIONS[like]
    except (ImportError, KeyError) as error:
        raise gone(f"masks to register attention functions with ({error})", "prefix-tuning") from error
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, masks)


def attention_function(name: str, module: nn.Module) -> Callable:
    """Returns the attention function ``name`` as the attention ``module`` runs it. Raises InputError as above."""
    try:
        if name == "eager":  # each model file has its own
            return sys.modules[type(module).__module__].eager_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[name]
    except (AttributeError, ImportError, KeyError) as error:
        raise gone(f"{name} attention function for {type(module).__name__}", "prefix-tuning") from error


def choose_attention(model: nn.Module, before: str | None, name: str) -> None:
    """Lets the models in ``model`` that run the attention function ``before`` run ``name``."""
    from transformers import PreTrainedModel

    for module in model.modules():
        # transformers 5.17 leaves T5's encoder and decoder out, whose configs are copies of the model's
        if isinstance(module, PreTrainedModel) and attention_implementation(module.config) == before:
            module.set_attn_implementation(name)


def runs_attention_functions(attention: nn.Module) -> bool:
    """Returns whether ``attention`` calls the function that its config names, rather than computing everything itself.

    Known by the table that its ``forward`` looks into. If that is gone, returns False, and a prefix is refused.
    """
    code = getattr(inspect.unwrap(type(attention).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


# ---- caches of generation -------------------------------------------------------------------------------------------

_PLAIN = (Tensor, bool, int, float, str, tuple, list, dict, type(None))


def cache_in(arguments: dict[str, Any]) -> Any:
    """Returns the cache of keys and values among the keyword arguments of a model's or layer's forward, or None.

    It is found by what it is, no tensor and no plain value, since its keyword has changed: ``past_key_values`` up to
    transformers 5.23, ``cache`` since.
    """
    return next((value for value in arguments.values() if not isinstance(value, _PLAIN)), None)


def takes_first_tokens(cache: Any, index: int) -> bool:
    """Returns whether ``fill_cache`` can fill ``cache``: its tensors grow, and it has nothing of layer ``index`` yet.

    If a name is gone, returns False: layers with a cache then run as they are.
    """
    try:
        from transformers import DynamicCache, EncoderDecoderCache

        if not isinstance(cache, EncoderDecoderCache):
            return type(cache) is DynamicCache and cache.get_seq_length(index) == 0
        parts = cache.self_attention_cache, cache.cross_attention_cache
        return all(takes_first_tokens(part, index) for part in parts) and not cache.is_updated.get(index)
    except (AttributeError, ImportError):
        return False


def fill_cache(cache: Any, index: int, key: Tensor, value: Tensor, *cross: Tensor) -> None:
    """Puts the first keys and values of layer ``index`` into ``cache``, (rows, heads, tokens, head_dim) each.

    key, value: those of the self-attention. cross: those of the cross-attention.
    """
    if not hasattr(cache, "self_attention_cache"):
        cache.update(key, value, index)
        return
    cache.self_attention_cache.update(key, value, index)
    if cross:
        cache.cross_attention_cache.update(*cross, index)
        cache.is_updated[index] = True


def self_attention_caches(cache: Any) -> list[Any]:
    """Returns what ``cache`` holds of the decoder's self-attentions, one for each layer that has any yet.

    Each has ``keys`` and ``values`` (rows, heads, tokens, head_dim). If they are gone, raises InputError: bytes of a
    search cannot be counted, so ``--memory`` is refused.
    """
    try:
        return [layer for layer in cache.self_attention_cache.layers if layer.keys is not None]
    except AttributeError as error:
        raise gone(f"{error.name} of {type(cache).__name__}", "counting the bytes of beam search (--memory)") from error


def lengthen(layer: Any, length: int) -> None:
    """Gives ``layer``, one of ``self_attention_caches``, room for ``length`` tokens, whose values are not set.

    One with a sliding window holds as many as the window has beside the token that reads them.
    """
    if (window := getattr(layer, "sliding_window", None)) is not None:
        layer.cumulative_length, length = length, min(length, window - 1)
    for name in ("keys", "values"):
        held = getattr(layer, name)
        setattr(layer, name, held.new_empty(*held.shape[:2], length, held.shape[3]))


def cache_field(output: type) -> str:
    """Returns the name of the cache in a model's output: ``past_key_values`` up to transformers 5.23, ``cache`` since.

    If it is gone, raises InputError.
    """
    for name in ("cache", "past_key_values"):
        if name in getattr(output, "__dataclass_fields__", ()):
            return name
    raise gone(f"cache in {output.__name__}", "a loss without logits")


def cache_of(output: Any) -> Any:
    """Returns the cache in a model's output."""
    return output[cache_field(type(output))]


# ---- models ---------------------------------------------------------------------------------------------------------


def model_of(cls: type, config: Any, dtype: torch.dtype) -> nn.Module:
    """Returns a model of class ``cls`` in ``dtype``, with the attention function that ``config`` names.

    If it is gone, the class is called and its result cast: the same, but for its peak.
    """
    make = getattr(cls, "_from_config", None)
    return cls(config).to(dtype) if make is None else make(config, dtype=dtype)


# Classes whose forward, read line by line, takes the cross-entropy of its logits and labels, ``CrossEntropyLoss()``,
# and nothing else of either, with the logits from ``lm_head`` and perhaps ``final_logits_bias``, or with T5Gemma's cap.
# NLLB-MoE may add its routers' losses to it (``adds_losses``). True: with labels, it returns a cache in training, where
# the config has it. A class that is not here computes its loss in its own way.
LOSSES = {
    "BartForConditionalGeneration": False,
    "BigBirdPegasusForConditionalGeneration": False,
    "BlenderbotForConditionalGeneration": False,
    "BlenderbotSmallForConditionalGeneration": False,
    "LEDForConditionalGeneration": False,
    "LongT5ForConditionalGeneration": True,
    "M2M100ForConditionalGeneration": True,
    "MBartForConditionalGeneration": False,
    "MT5ForConditionalGeneration": True,
    "MarianMTModel": False,
    "NllbMoeForConditionalGeneration": True,
    "MvpForConditionalGeneration": False,
    "PLBartForConditionalGeneration": True,
    "PegasusForConditionalGeneration": False,
    "PegasusXForConditionalGeneration": False,
    "SeamlessM4TForTextToText": False,
    "SeamlessM4Tv2ForTextToText": False,
    "T5ForConditionalGeneration": True,
    "T5GemmaForConditionalGeneration": False,
    "UMT5ForConditionalGeneration": True,
}


def own_loss_function(model: nn.Module) -> bool:
    """Returns whether somebody has given ``model`` a loss function in the place of transformers' (``loss_function``).

    If that is gone, returns False.
    """
    return vars(model).get("_loss_function") is not None


# Classes of output projections that are a module around a linear layer, ``out_proj``, and compute nothing else.
HEADS = ("T5GemmaLMHead",)


def head_linear(head: Any) -> Any:
    """Returns the linear layer of an output projection: ``head``, or the one in it where it is one of ``HEADS``."""
    return head if type(head) is nn.Linear or class_of(type(head).forward) not in HEADS else head.out_proj


def forward_owner(cls: type) -> type:
    """Returns the class that ``cls`` has its forward from."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def knows_loss(cls: type) -> bool:
    """Returns whether ``cls`` runs the forward of a class in ``LOSSES``, as transformers' file of that class has it.

    A subclass with a forward of its own does not, nor one whose forward somebody has replaced.
    """
    owner = forward_owner(cls)
    if owner.__name__ not in LOSSES or not owner.__module__.startswith("transformers.models."):
        return False
    file = sys.modules[owner.__module__].__file__
    package = sys.modules["transformers"].__path__[0] + os.sep
    function = vars(owner)["forward"]
    while hasattr(function, "__wrapped__"):
        if not function.__code__.co_filename.startswith(package):
            return False
        function = function.__wrapped__
    return function.__qualname__ == f"{owner.__name__}.forward" and function.__code__.co_filename == file


def has_cache_beside_loss(model: nn.Module) -> bool:
    """Returns what ``LOSSES`` has for the class of ``model``, or of the first one above it that is there."""
    return next(LOSSES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in LOSSES)


def adds_losses(model: Any, arguments: dict[str, Any]) -> bool:
    """Returns whether a model of ``LOSSES``, called with ``arguments``, adds losses of its routers to the
    cross-entropy."""
    given = arguments.get("output_router_logits")
    return bool(getattr(model.config, "output_router_logits", False) if given is None else given)


def returns_cache(model: Any) -> bool:
    """Returns whether a model of ``LOSSES`` returns a cache beside a loss when ``use_cache`` is not given."""
    if not has_cache_beside_loss(model):
        return False
    decoder = model.get_decoder()
    checkpointed = getattr(decoder, "gradient_checkpointing", False) and decoder.training
    return bool(decoder.config.use_cache) and not checkpointed


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Returns what the decoder reads to predict ``labels``, by the model's own rule.

    T5's family has it as a method, BART's as a function in the file of the model. Raises
    InputError where neither is there.
    """
    if hasattr(model, "_shift_right"):
        return model._shift_right(labels)
    config, shift = model.config, _shift_function(model)
    arguments = (config.pad_token_id, config.decoder_start_token_id)
    return shift(labels, *arguments[: len(inspect.signature(shift).parameters) - 1])


def _shift_function(model: nn.Module) -> Callable:
    # a subclass may stand in a file that has imported the function of another family
    for cls in sorted(type(model).__mro__, key=lambda cls: not cls.__module__.startswith("transformers.")):
        function = getattr(sys.modules.get(cls.__module__), "shift_tokens_right", None)
        if function is not None:
            return function
    raise InputError(
        f"model {type(model).__name__}: no rule to make decoder inputs from labels; expected decoder_input_ids"
    )


def sides(config: Any) -> tuple[Any, Any] | None:
    """Returns the configurations of encoder and decoder where each has one (T5Gemma), else None."""
    found = getattr(config, "encoder", None), getattr(config, "decoder", None)
    return found if all(hasattr(own, "vocab_size") for own in found) else None


def set_depth(config: Any, name: str, depth: int) -> None:
    """Sets the number of layers, and with it the kinds of attention that T5Gemma names for each (``layer_types``)."""
    setattr(config, name, depth)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[i % len(kinds)] for i in range(depth)]


def target_words(config: Any) -> int:
    """Returns how many words a model chooses among."""
    both = sides(config)
    return config.vocab_size if both is None else both[1].vocab_size


def start_of_decoder(config: Any) -> int | None:
    """Returns the id that T5Gemma's decoder begins with, ``decoder.bos_token_id``; None for other models."""
    both = sides(config)
    return None if both is None else both[1].bos_token_id


def marks_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the ids that ``tokenizer`` itself puts before and behind a text: its begin and end of a sentence."""
    found = tokenizer("")["input_ids"]
    before, behind = ([mark] if mark in found else [] for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    return before, behind


def has_words_like_languages(tokenizer: Any) -> bool:
    """Returns whether pieces of words look like languages ("en_US" in Gemma's vocabulary, which has code as well).

    Added tokens may be languages still.
    """
    return type(tokenizer).__name__.startswith("Gemma")


def has_own_head(config: Any) -> bool:
    """Returns whether ``config`` has an output projection with a weight of its own.

    In T5's family ``tie_word_embeddings`` is always true, and ``scale_decoder_outputs`` has what the file had there. If
    that is gone, returns False.
    """
    return config.model_type == "mt5" or getattr(config, "scale_decoder_outputs", True) is False


class _Never:
    """The layerdrop of a model that drops none. A number is drawn even for a rate of 0 and compared with it, which a
    fake tensor cannot be.
    """

    def __gt__(self, other: object) -> bool:
        return False


def drop_no_layer(model: nn.Module) -> None:
    """Lets no layer of ``model`` be skipped at random, on fake tensors neither. If it is gone, nothing is drawn."""
    module: Any
    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.layerdrop = _Never()


def resized_embeddings(cls: type) -> str | None:
    """Returns the method of ``PreTrainedModel`` that makes every table of another size, by its name.

    If it is gone, returns None: ``resize_token_embeddings`` is checked alone, and Marian's method for a decoder's own
    table leaves an adapter on it behind.
    """
    return "_get_resized_embeddings" if hasattr(cls, "_get_resized_embeddings") else None


def loads_checkpoints(cls: type) -> tuple[str, str]:
    """Returns the methods of ``Trainer`` that load a checkpoint: to go on from, and the best one at the end.

    If they are gone, raises InputError: a Trainer would go on from a fresh adapter.
    """
    for name in ("_load_from_checkpoint", "_load_best_model"):
        if not hasattr(cls, name):
            raise gone(f"Trainer.{name}", "bringing an adapter back from a Trainer's checkpoint")
    return "_load_from_checkpoint", "_load_best_model"


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def pieces_of(tokenizer: Any, target: bool) -> tuple[Any, dict[str, int]] | None:
    """Returns (SentencePiece model, its pieces' ids) of a tokenizer in Python, which takes a sentence at a time.

    M2M-100's and Marian's, whose two sides may differ. Where they are gone, returns None, and the tokenizer
    itself is called, which gives the same ids, later.
    """
    if hasattr(tokenizer, "sp_model") and isinstance(getattr(tokenizer, "encoder", None), dict):
        return tokenizer.sp_model, tokenizer.encoder
    if hasattr(tokenizer, "spm_source"):
        separate = target and tokenizer.separate_vocabs
        model = tokenizer.spm_target if target else tokenizer.spm_source
        return model, tokenizer.target_encoder if separate else tokenizer.encoder
    return None


def byte_offset(tokenizer: Any) -> int | None:
    """Returns the id of byte 0 in a tokenizer of bytes (ByT5's), whose ids are a text's UTF-8 bytes behind its marks.

    None for any other. If the name is gone, returns None, and the tokenizer itself is called: later, and without words
    that were added.
    """
    return getattr(tokenizer, "offset", None) if type(tokenizer).__name__ == "ByT5Tokenizer" else None


def target_ids(tokenizer: Any) -> dict[str, int] | None:
    """Returns pieces and ids of the target's vocabulary where a tokenizer has one a side (Marian's may), else None.

    If the names are gone, returns None, and the tokenizer itself is called.
    """
    return getattr(tokenizer, "target_encoder", None) if getattr(tokenizer, "separate_vocabs", False) else None


def language_ids(tokenizer: Any) -> dict[str, int] | None:
    """Returns M2M-100's language tokens, with their ids. If they are gone, returns None; the vocabulary is searched."""
    ids = getattr(tokenizer, "lang_token_to_id", None)
    return None if ids is None else dict(ids)


def rows_of_m2m100(tokenizer: Any) -> int:
    """Returns the number of ids that an M2M-100 tokenizer gives away, language tokens included.

    If they are gone, raises InputError: ``--model new`` alone needs it.
    """
    try:
        return len(tokenizer.encoder) + len(tokenizer.lang_token_to_id)
    except AttributeError as error:
        raise gone(f"{error.name} of {type(tokenizer).__name__}", "a new model") from error


def ends_with_language(tokenizer: Any) -> bool:
    """Returns whether a source ends with its language: mBART of 25 languages, NLLB's legacy form.

    If the name is gone, a source begins with it.
    """
    return getattr(tokenizer, "prefix_tokens", None) == []


def has_pieces_apart(tokenizer: Any) -> bool:
    """Returns whether the vocabulary stands beside the SentencePiece model, as Marian's does.

    If that is gone, tags are split as text is.
    """
    return hasattr(tokenizer, "current_spm")
