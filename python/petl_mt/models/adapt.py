"""A loaded model made ready for training: the method, dropout, and the dtypes of frozen and trained tensors."""

from __future__ import annotations

import difflib
from typing import Any, cast

import torch
from torch import nn

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.layers.wide_linear import widen_linears
from petl_kernels.methods import METHODS
from petl_kernels.methods.base import Method
from petl_kernels.methods.lora import with_lengths_that_follow
from petl_kernels.models.structure import all_modules
from petl_kernels.models.transformers_names import is_activation_dropout
from petl_kernels.ops.quantized import QuantizedTensor

from ..config import TrainConfig
from .precision import product_dtype


def prepare_model(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Returns ``model`` with the method of ``config``, its dropout and its dtypes; on the meta device, too."""
    model = adapt(model, config)
    set_dropout(model, config.dropout, config.attention_dropout)
    if (dtype := product_dtype(config)) is not None:
        cast_frozen_matrices(model, dtype)
    for parameter in model.parameters():  # biases that BitFit gives to a model that was read in 16 bits
        if parameter.requires_grad and parameter.dtype.itemsize == 2:
            parameter.data = parameter.data.float()
    return model


def adapt(model: Any, config: TrainConfig) -> Any:
    """Returns ``model`` with what ``config.method`` trains; everything else is frozen."""
    if config.method not in METHODS:
        near = difflib.get_close_matches(config.method or "", METHODS, n=3) or list(METHODS)
        raise InputError(f"method {config.method!r}: unknown; expected {', '.join(near)}")
    method = METHODS[config.method]
    if config.params is not None:
        settings = method.for_budget(model, config.params, **config.method_args)
    else:
        settings = method(**config.method_args)
    _check_dense(model, config.method, settings)
    if config.method == "full":  # no copy of the base to go back to
        return model.requires_grad_(True)
    return pk.adapt(model, settings)


def _check_dense(model: Any, name: str, settings: Method) -> None:
    """Raises InputError for a method that trains a tensor which the checkpoint holds in 8 or 4 bits."""
    for key in settings.base_tensors(model):
        weight = model.get_parameter(key)
        if isinstance(weight, QuantizedTensor):
            raise InputError(
                f"method {name}: trains {key}, which the checkpoint holds in {weight.storage}; expected the checkpoint "
                "that was quantized, or another method"
            )


def set_dropout(model: nn.Module, dropout: float | None, attention_dropout: float | None) -> None:
    """Sets the rates of a model; None leaves one as it is.

    Families keep rates as numbers on attentions and layers (BART's), or as Dropout modules as well (T5's, T5Gemma's).
    Rates behind activations and of experts' tokens, which some configurations have beside ``dropout``, stay as they
    are.
    """
    for path, module in all_modules(model):
        if is_activation_dropout(path):
            continue
        is_attention = hasattr(module, "q_proj") or (hasattr(module, "q") and hasattr(module, "k"))
        rate = attention_dropout if is_attention else dropout
        if rate is None:
            continue
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(getattr(module, "dropout", None), float) and _is_of_transformers(module):
            cast("Any", module).dropout = rate
        elif is_attention and hasattr(module, "attention_dropout") and _is_of_transformers(module):
            cast("Any", module).attention_dropout = rate  # T5Gemma's


def _is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def cast_frozen_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts frozen matrices to ``dtype``; vectors (biases, norms), which are small, and trained tensors stay.

    In fp16, linear layers that transformers keeps in fp32 are in fp32, and compute in it: ``widen_linears``.
    """
    wide = widen_linears(model) if dtype == torch.float16 else set()
    with with_lengths_that_follow(model):
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dim() > 1:
                parameter.data = parameter.data.to(torch.float32 if parameter in wide else dtype)
