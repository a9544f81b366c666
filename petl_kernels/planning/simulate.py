"""The bytes of a training step, found without a weight: the step runs on fake tensors, which have shapes and no values.

A simulation runs the same modules, hooks and autograd rules as a real step, and counts what they allocate. A model of
one or two layers a side stands for a deep one, whose layers are alike.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import no_layerdrop
from petl_kernels.layers.border import as_on
from petl_kernels.layers.lean_model import lean_model
from petl_kernels.layers.loss.lean_loss import packing_obstacle
from petl_kernels.layers.mixed_in import original_class
from petl_kernels.layers.wide_linear import is_widened, widen_linears
from petl_kernels.methods.adapt import adapt
from petl_kernels.methods.owner import active_name, records
from petl_kernels.models.structure import all_modules
from petl_kernels.models.transformers_names import drop_no_layer, model_of, set_depth, sides
from petl_kernels.planning.peak import Ledger
from petl_kernels.step.gradients import RoundedGradients
from petl_kernels.weights.quantized import quantize_model, storages_of

_LAYER = re.compile(r"(\.(?:layers|block))\.\d+\.")
# Names of the depths (encoder, decoder) in the configurations of the two families.
_DEPTHS = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"))


@dataclass(frozen=True)
class Phases:
    """Bytes beside what lives through the whole step (weights, gradients, optimiser state).

    kept: between forward and backward. forward, backward: the most while they run, kept bytes included.
    """

    kept: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class Batch:
    """Sentence pairs of ``source`` and ``target`` tokens each."""

    pairs: int
    source: int
    target: int

    @property
    def tokens(self) -> int:
        """Tokens of the longer side."""
        return self.pairs * max(self.source, self.target)


def shallow(
    model: nn.Module, encoder: int, decoder: int, storage: str = "dense", tables: str | None = None
) -> nn.Module:
    """Returns a model like ``model`` with that many layers, on the fake tensors of the mode that is on.

    Dtypes, dropout rates, the active adapter's method and what is trained are those of ``model``; frozen weights are
    in ``storage``, embeddings and the output projection in ``tables``, as ``quantize_model`` leaves them. What
    ``model`` holds in 8 or 4 bits already stays so.
    """
    config = copy.deepcopy(model.config)
    for (own, name), depth in zip(_depths(config), (encoder, decoder), strict=True):
        set_depth(own, name, depth)
    no_layerdrop(config)  # drawn layer by layer, and the worst step drops none
    like = model_of(original_class(type(model)), config, torch.float32)
    given = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    _set_dtypes(like, given)
    name = active_name(model)
    if name is None:
        for key, parameter in like.named_parameters():
            parameter.requires_grad_(key in given and given[key].requires_grad)
    else:
        adapt(like, records(model)[name].config)
    if is_widened(model):
        widen_linears(like)
    _set_rates(like, model)
    drop_no_layer(like)
    wanted = tuple(
        kind if there == "dense" else there
        for kind, there in zip((storage, tables or storage), storages_of(model), strict=True)
    )
    if wanted != ("dense", "dense"):
        quantize_model(like, *wanted)
    return like.train(True)


def step(
    model: nn.Module,
    batch: Batch,
    *,
    autocast: torch.dtype | None = None,
    gradients: str = "float32",
    packed: bool = False,
    device: str = "cpu",
) -> Phases:
    """Runs forward and backward of ``model``, whose parameters are fake, and returns what they take.

    Gradients exist already, as in every micro-batch but the first. gradients: "bfloat16" when they wait for the update
    in ``RoundedGradients``. packed: the sentences of ``batch`` are one packed row, where ``model`` reads such rows.
    device: the kind whose kernels are counted; the tensors are the CPU's.
    """
    inputs = _inputs(model, batch, packed)
    trained = [p for p in model.parameters() if p.requires_grad]
    with _earlier_gradients(trained, gradients) as sums, _ledger(model, sums, device) as ledger, _under(autocast):
        always = ledger.live
        loss = model(**inputs).loss
        kept, forward = ledger.live - always, ledger.peak - always
        ledger.peak = ledger.live
        loss.backward()
        return Phases(kept, forward, ledger.peak - always)


def kept(
    model: nn.Module, batch: Batch, *, autocast: torch.dtype | None = None, packed: bool = False, device: str = "cpu"
) -> int:
    """Returns the same ``Phases.kept`` as ``step``, without a backward pass, which takes more than half of the time."""
    inputs = _inputs(model, batch, packed)
    with _ledger(model, (), device) as ledger, _under(autocast):
        always = ledger.live
        loss = model(**inputs).loss
        found = ledger.live - always
        del loss
        return found


def _ledger(model: nn.Module, more: Sequence[Tensor], device: str) -> Ledger:
    return Ledger([*model.parameters(), *model.buffers(), *more], device)


def _inputs(model: nn.Module, batch: Batch, packed: bool) -> dict[str, Any]:
    """Returns what ``model`` is called with for a summed loss of ``batch``."""
    rows = _packed_row(batch) if packed and not packing_obstacle(model) else _padded_rows(batch)
    return {**rows, "label_smoothing": 0.1, "reduction": "sum"}


def _padded_rows(batch: Batch) -> dict[str, Tensor]:
    ids = torch.ones(batch.pairs, batch.source, dtype=torch.long)
    labels = torch.ones(batch.pairs, batch.target, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _packed_row(batch: Batch) -> dict[str, Tensor | int]:
    ids = torch.ones(1, batch.pairs * batch.source, dtype=torch.long)
    labels = torch.ones(1, batch.pairs * batch.target, dtype=torch.long)
    ends = torch.arange(batch.pairs + 1, dtype=torch.int32)
    return {
        "input_ids": ids,
        "labels": labels,
        "decoder_input_ids": torch.ones_like(labels),
        "cu_seqlens": ends * batch.source,
        "decoder_cu_seqlens": ends * batch.target,
        "longest": max(batch.source, batch.target),
    }


@contextmanager
def _earlier_gradients(trained: list[nn.Parameter], gradients: str) -> Generator[list[Tensor], None, None]:
    """Gives ``trained`` the gradients that earlier micro-batches have left, and yields their tensors."""
    earlier = [torch.empty_like(parameter) for parameter in trained] if gradients == "float32" else []
    for i, parameter in enumerate(trained):
        parameter.grad = earlier[i] if earlier else None
    if gradients == "float32":
        yield earlier
        return
    rounded = RoundedGradients(trained)
    try:
        yield [rounded.sum_of(parameter) for parameter in trained]
    finally:
        rounded.close()


def _under(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode()


def set_tiers(model: nn.Module, tiers: Sequence[int], device: str = "cpu") -> None:
    """Makes ``model`` lean at ``tiers``, one a layer, as on a kind of device: weights stand together there or not."""
    with as_on(device):
        lean_model(model, tiers)


def depths(config: Any) -> tuple[int, int]:
    """Returns the numbers of layers of encoder and decoder."""
    (encoder, first), (decoder, second) = _depths(config)
    return int(getattr(encoder, first)), int(getattr(decoder, second))


def _depths(config: Any) -> tuple[tuple[Any, str], tuple[Any, str]]:
    """Returns (the configuration, the name in it) of the number of layers, for encoder and decoder."""
    if (both := sides(config)) is not None:
        return (both[0], "num_hidden_layers"), (both[1], "num_hidden_layers")
    for encoder, decoder in _DEPTHS:
        if getattr(config, encoder, None) is not None and getattr(config, decoder, None) is not None:
            return (config, encoder), (config, decoder)
    raise InputError(f"config of {type(config).__name__}: no numbers of layers; expected an encoder-decoder's")


def _set_dtypes(like: nn.Module, given: dict[str, Tensor]) -> None:
    """Gives each parameter and buffer the dtype of its namesake in ``given``; tied ones stay tied.

    A layer that ``given`` does not have, being shallower, gets the dtypes of the first.
    """

    def namesake(path: str, name: str) -> str:
        key = f"{path}.{name}" if path else name
        return key if key in given else _LAYER.sub(r"\1.0.", key)

    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in all_modules(like):
        for name, parameter in module.named_parameters(recurse=False):
            key = namesake(path, name)
            dtype = given[key].dtype if key in given else parameter.dtype
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, dtype=dtype))
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            key = namesake(path, name)
            if key in given:
                setattr(module, name, torch.empty_like(buffer, dtype=given[key].dtype))


def _set_rates(like: nn.Module, model: nn.Module) -> None:
    """Copies the dropout rates that stand on the modules of ``model``, where a trainer may have changed them."""
    modules = dict(all_modules(model))
    for path, module in all_modules(like):
        known = modules.get(path, modules.get(_LAYER.sub(r"\1.0.", path + ".")[:-1]))
        for rate in ("p", "dropout", "attention_dropout", "stored_dropout", "activation_dropout"):
            value = getattr(known, rate, None)
            if isinstance(value, float) and isinstance(vars(module).get(rate), (int, float)):
                setattr(module, rate, value)
