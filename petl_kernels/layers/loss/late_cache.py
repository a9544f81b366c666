"""The cache of keys and values that a model returns beside a loss, made when it is read.

M2M-100's and T5's forwards make one by default (``config.use_cache``), with labels too. It would hold the keys and
values of all layers, and is rarely read in training. So where gradients are recorded and ``use_cache`` is not given,
the model runs without a cache, and ``late_cache`` returns the object in its place.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from petl_kernels.layers.loss.projection import autocast_now
from petl_kernels.models.transformers_names import cache_field, cache_in, returns_cache


def late_cache(model: Any, make: Callable[[], object]) -> object:
    """Returns an EncoderDecoderCache that gets the values of ``make()`` when it is read.

    To read it raises RuntimeError where these would be others: ``model`` was in training mode, or its mode or
    parameters have changed since.
    """
    trained, autocast = model.training, autocast_now(model.device.type)
    before = None if trained else _State(model)

    def checked() -> object:
        if trained:
            raise RuntimeError("cache (past_key_values) after pk.lean, in training mode: expected use_cache=True")
        if before is None or model.training or not before.is_of(model):
            raise RuntimeError(
                "cache (past_key_values) after pk.lean: the model's mode or parameters changed since the forward pass;"
                " expected use_cache=True"
            )
        with torch.inference_mode(False), torch.enable_grad(), autocast():
            return make()

    return _class()(checked)


def leaves_out_cache(model: nn.Module, kwargs: dict) -> bool:
    """Returns whether ``model`` is to run without the cache that it would return, since no argument is about one."""
    if kwargs.get("use_cache") is not None or cache_in(kwargs) is not None or not torch.is_grad_enabled():
        return False
    return returns_cache(model)


def with_cache(output: Any, cache: object) -> object:
    """Returns ``output`` (a model's own, or a tuple of loss, logits and the rest) with ``cache`` in its place there."""
    if isinstance(output, tuple):
        return *output[:2], cache, *output[2:]
    return type(output)(**{**output, cache_field(type(output)): cache})


class _State:
    """The parameters of a model, by identity, and their versions.

    The references are weak, and not ids: that of a parameter that has gone may be another one's now.
    """

    def __init__(self, model: nn.Module):
        self.seen = [(weakref.ref(parameter), parameter._version) for parameter in _parameters(model)]

    def is_of(self, model: nn.Module) -> bool:
        now = _parameters(model)
        return len(now) == len(self.seen) and all(
            seen() is parameter and parameter._version == version
            for parameter, (seen, version) in zip(now, self.seen, strict=True)
        )


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not parameter.is_inference()]


@functools.cache
def _class() -> type:
    from transformers import EncoderDecoderCache

    class LateCache(EncoderDecoderCache):
        def __init__(self, make: Callable[[], object]):
            self.petl_make = make

        def __getattr__(self, name: str):
            if name.startswith("__") or "petl_make" not in self.__dict__:
                raise AttributeError(name)
            made = self.petl_make()
            del self.petl_make
            self.__dict__.update(made.__dict__)
            return getattr(self, name)

        def __bool__(self) -> bool:
            return True  # with labels each layer puts its keys there

        def __repr__(self) -> str:
            return "LateCache(made when it is read)" if "petl_make" in self.__dict__ else super().__repr__()

        def __reduce_ex__(self, protocol):
            len(self)  # makes it
            return EncoderDecoderCache.__new__, (EncoderDecoderCache,), self.__dict__

    return LateCache
