"""Models that something else has changed, so that an adapter's paths and values would not be the plain model's."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from petl_kernels.errors import InputError
from petl_kernels.methods.owner import records
from petl_kernels.methods.pieces import Named
from petl_kernels.models.structure import check_model

_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "deepspeed.", "accelerate.")


def check_unwrapped(model: object) -> None:
    """Raises InputError for what is no module, and for a wrapper, whose paths are not those of the model inside."""
    check_model(model)
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise InputError(f"model {kind}: compiled, expected the model inside (model._orig_mod); compile it afterwards")
    if type(model).__module__.startswith(_WRAPPERS) and hasattr(model, "module"):
        raise InputError(f"model {kind}: a wrapper, expected the model inside (model.module); wrap it afterwards")


def check_adaptable(model: nn.Module) -> None:
    """Raises InputError for models that ``adapt`` cannot change: wrapped, or changed by PEFT or torch."""
    check_unwrapped(model)
    for path, module in model.named_modules():
        where = f"model {type(model).__name__}: {path or 'it'!r}"
        if type(module).__module__.startswith("peft."):
            raise InputError(
                f"{where} is PEFT's {type(module).__name__}: expected the plain model; merge_and_unload() or unload() "
                "gives it, and pk.load_adapter(model, folder) reads PEFT's files"
            )
        if hasattr(module, "_orig_mod"):
            raise InputError(f"{where} is compiled: adapt the model first and compile it afterwards")
        if parametrize.is_parametrized(module):
            raise InputError(f"{where} has parametrizations: remove them (parametrize.remove_parametrizations) before")
        if isinstance(module, Named) and module.keys() - records(model).keys():
            name = sorted(module.keys() - records(model).keys())[0]
            raise InputError(
                f"{where} has an adapter {name!r} that is not this model's: is the module in another, too?"
            )


def check_no_peft(model: nn.Module) -> None:
    """Raises InputError for an adapted model that PEFT has changed since: it has moved the adapters' modules."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise InputError(
                f"model {type(model).__name__}: {path!r} is PEFT's {type(module).__name__}: unload() it first"
            )
