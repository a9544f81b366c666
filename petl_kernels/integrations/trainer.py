"""Adapters in the checkpoints of transformers' ``Trainer``: no callback is needed.

A checkpoint holds what ``save_pretrained`` writes, the plain model and each adapter in a subfolder of its name.
``resume_from_checkpoint`` and ``load_best_model_at_end`` give the model's adapters the values from there, bit for bit.
A checkpoint without one of them is refused, and so is one with adapters for a model that has none. FSDP and DeepSpeed,
which spread a model over devices, are refused for an adapted model before anything is trained.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.interop.adapters import fill_adapters, held_adapters
from petl_kernels.interop.plain import without_adapters
from petl_kernels.methods.owner import records
from petl_kernels.models.transformers_names import loads_checkpoints


def wrap(trainer: ModuleType) -> None:
    """Wraps the methods of ``Trainer``, in place. Warns in one line where they are gone."""
    cls = trainer.Trainer
    cls.__init__ = _constructing(cls.__init__)
    try:
        resume, best = loads_checkpoints(cls)
    except InputError as error:
        warnings.warn(f"{error}; use pk.load_adapter(model, checkpoint)", stacklevel=2)
        return
    setattr(cls, resume, _resuming(getattr(cls, resume)))
    setattr(cls, best, _loading_best(getattr(cls, best)))


def _constructing(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        _refuse_spread(self)

    return __init__


def _refuse_spread(trainer) -> None:
    found = next((name for name in _SPREADING if getattr(trainer, f"is_{name.lower()}_enabled", False)), None)
    name = next((name for module in _modules(trainer) for name in records(module)), None)
    if found and name:
        raise InputError(
            f"Trainer with {found}: the model has the adapter {name!r}, and adapters of a model that is spread over "
            "devices are not supported: expected a whole model in each process, as DistributedDataParallel has"
        )


_SPREADING = ("FSDP", "DeepSpeed")


def _modules(trainer) -> list[nn.Module]:
    model = getattr(trainer, "model", None)
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _resuming(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_from_checkpoint(self, resume_from_checkpoint, model=None):
        arguments = (resume_from_checkpoint,) if model is None else (resume_from_checkpoint, model)
        _load(self, resume_from_checkpoint, lambda: original(self, *arguments))

    return load_from_checkpoint


def _loading_best(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_best_model(self):
        _load(self, self.state.best_model_checkpoint, lambda: original(self))

    return load_best_model


def _load(trainer, folder: str, load: Callable[[], None]) -> None:
    """Runs ``load()`` for the plain model, and gives it its adapters from ``folder``."""
    from transformers import PreTrainedModel

    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not isinstance(model, PreTrainedModel):  # saved and loaded with all of its tensors
        return load()
    _refuse_spread(trainer)
    if not records(model):
        held = held_adapters(folder)
        if held:
            raise InputError(
                f"{folder} holds the adapter {held[0]!r} and this model has none: "
                "adapt the model as it was (pk.adapt, pk.load_adapter) before resuming"
            )
        return load()
    with without_adapters(model):
        load()
    fill_adapters(model, folder)
