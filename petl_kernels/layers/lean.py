"""Lean layers in the place of a model's own: which ones, in which tier, and why some are not.

A layer keeps its module, parameters, hooks and paths. Only its class changes: to one of the same name with a lean
``forward`` before the layer's own, which still runs for generation with a cache and wherever else the lean one cannot:
where somebody wants to see or has changed what the lean one passes over. ``layer_states`` says what runs now.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from petl_kernels import versions
from petl_kernels.errors import InputError, shown
from petl_kernels.layers.bart import LeanBartLayer
from petl_kernels.layers.border import Border, groups_of, renew
from petl_kernels.layers.boundaries import is_packed
from petl_kernels.layers.hooks import hooked_all, hooks_on, is_foreign
from petl_kernels.layers.recompute import checkpointed, forget, forget_all
from petl_kernels.layers.rule import Call, Rule, Unknown, Watch
from petl_kernels.layers.t5 import LeanT5Layer
from petl_kernels.layers.wide_ffn import WideFFN, bottleneck_beside
from petl_kernels.models.structure import Layer, Structure, describe
from petl_kernels.models.transformers_names import (
    attention_implementation,
    cache_in,
    class_of,
    class_that_runs,
    fill_cache,
    takes_first_tokens,
)
from petl_kernels.ops.philox import RATES, has_mask

TIERS = (1, 2, 3, 4, 5)
FAMILIES = {"bart": LeanBartLayer, "t5": LeanT5Layer}
# Attention functions of transformers whose masks the lean attention reads, also with a prefix.
ATTENTIONS = ("eager", "sdpa", "petl_prefix_eager", "petl_prefix_sdpa")


@dataclass(frozen=True)
class LayerState:
    """``tier`` is 0 for a layer that is as it was; ``reason`` says why, where it cannot be lean.

    ``composed`` says why a lean layer runs op by op, where it has no rule of its own; empty where it has.
    """

    path: str
    tier: int
    reason: str
    composed: str = ""


class LeanLayer:
    """What the lean layers of both families share."""

    petl_tier: int
    petl_path: str
    petl_wide: WideFFN | None = None
    petl_borders: dict[str, Border] | None = None  # None: the weights' memory is not the layer's
    petl_bound: list[_Bound | None]

    def _apply(self, fn, recurse=True):
        """``to``, ``half`` and the like take each parameter apart from the others."""
        self.petl_bound[0] = None
        super()._apply(fn, recurse)
        if self.petl_wide is not None:
            self.petl_wide = self.petl_wide.moved()
        self.renew_borders()
        return self

    def renew_borders(self) -> None:
        """Let the linears that read one input stand together where they can; what has moved moves there again."""
        if self.petl_borders is not None:
            self.petl_bound[0] = None
            renew(self.petl_borders, groups_of(self.blocks(True)[0]))

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The module's, but for weights that stand together: these are copies, as of tensors with memory of their own.

        Whoever writes files leaves out, or refuses, all but one of the tensors that share memory.
        """
        found = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if not keep_vars:
            linears = (linear for border in (self.petl_borders or {}).values() for linear in border.linears)
            together = {id(linear.weight) for linear in linears}
            for name, parameter in self.named_parameters(remove_duplicate=False):
                if id(parameter) in together:
                    found[prefix + name] = found[prefix + name].clone(memory_format=torch.contiguous_format)
        return found

    def _replicate_for_data_parallel(self):
        """A replica has weights of its own on a device of its own, in no border, and no rule yet."""
        replica = super()._replicate_for_data_parallel()
        replica.petl_bound, replica.petl_borders, replica.petl_wide = [None], None, None
        return replica

    def run(self, kwargs: dict, x: Tensor, *inputs) -> Tensor:
        """The layer's output; a cache among ``kwargs`` gets what the layer's own forward puts there."""
        cache = cache_in(kwargs)
        tier = self.petl_tier if torch.is_grad_enabled() else 0
        rule = self._rule(x, crosses=inputs[2] is not None)
        if rule is not None:
            y, *keys = rule(Call(tier, x), x, *inputs, with_keys=cache is not None)
            y = self.finished(y)
        elif tier == 0:
            y, *keys = self.body(x, *inputs, 0)
        elif tier < 4:
            y, *keys = _recomputing(self, x, *inputs, tier)
        else:
            whole = partial(_whole, self, cache is not None)
            y, *keys = checkpointed(self, whole, x, *inputs, offload=tier == 5)
        if cache is not None:
            fill_cache(cache, self.layer_index(), *keys)
        return y

    def bound(self) -> _Bound:
        """What has been found out about the layer as it is now."""
        found = self.petl_bound[0]
        if found is None or not found.watch.holds():
            self.petl_bound[0] = found = _Bound(self)
        return found

    def _rule(self, x: Tensor, crosses: bool) -> Rule | None:
        """The autograd rule of the layer as it is now; None where it runs composed from ops."""
        if torch.compiler.is_compiling():  # a graph has rules of its own
            return None
        return self.petl_bound[0].rule(self, x, crosses)

    def steps_aside(self, kwargs: dict) -> bool:
        """Whether the layer's own forward runs: to generate with a cache, or when a lean one cannot stand for it."""
        cache = cache_in(kwargs)
        if cache is not None and not (torch.is_grad_enabled() and takes_first_tokens(cache, self.layer_index())):
            return True
        obstacle = _obstacle_of_graph(self) if torch.compiler.is_compiling() else self.bound().obstacle
        return bool(kwargs.get("output_attentions")) or bool(obstacle) or hooked_all()

    def refuse_packed(self, mask: Tensor | None, kwargs: dict) -> None:
        """Raises InputError where the layer steps aside for its own forward, which cannot read a packed row."""
        if is_packed(mask):
            reason = _obstacle(self) or ("output_attentions" if kwargs.get("output_attentions") else "a cache")
            raise InputError(f"cu_seqlens: {self.petl_path} reads no packed rows ({reason}); expected padded ones")

    def __reduce_ex__(self, protocol):
        mixin, original = type(self).petl_bases
        borders = None if self.petl_borders is None else {}
        return _bare, (mixin, original), {**self.__dict__, "petl_bound": [None], "petl_borders": borders}

    def __setstate__(self, state: dict) -> None:
        """A copy has weights of its own, which stand together as those of its original do."""
        super().__setstate__(state)
        self.renew_borders()


class _Bound:
    """What a lean layer needs to find out only when something about it has changed: see ``Watch``."""

    def __init__(self, layer: LeanLayer):
        self.watch, self.obstacle = Watch(layer), _obstacle(layer)
        self._rules: dict[tuple, Rule | str] = {}

    def rule(self, layer: LeanLayer, x: Tensor, crosses: bool) -> Rule | None:
        found = self.found(layer, x, crosses)
        return None if isinstance(found, str) else found

    def found(self, layer: LeanLayer, x: Tensor, crosses: bool) -> Rule | str:
        """Returns the rule for inputs like x, or why there is none."""
        device = x.device.type
        key = x.dtype, torch.is_autocast_enabled(device), crosses
        found = self._rules.get(key)
        if found is None or not (isinstance(found, str) or found.holds()):
            self._rules[key] = found = self._made(layer, x, crosses)
        return found

    def _made(self, layer: LeanLayer, x: Tensor, crosses: bool) -> Rule | str:
        try:
            return Rule(layer, *layer.blocks(crosses), x)
        except Unknown as reason:
            return str(reason)


@torch.compiler.disable  # recipes are no part of a graph: it breaks here, once a layer, and is not made anew
def _recomputing(layer: LeanLayer, *inputs) -> tuple[Tensor, ...]:
    try:
        outputs = layer.body(*inputs)
    except BaseException:
        forget_all()  # after too little memory a step is tried again
        raise
    forget()
    return outputs


def _whole(layer: LeanLayer, cached: bool, x: Tensor, *inputs) -> tuple[Tensor, ...]:
    outputs = layer.body(x, *inputs, 0)
    return outputs if cached else outputs[:1]


def lean_layers(model: nn.Module, tier: int | Sequence[int]) -> None:
    """Make the layers of ``model`` lean, in place; see ``petl_kernels.lean``."""
    versions.check("transformers")
    try:
        structure = describe(model)
    except InputError:
        _tiers(tier, 0)
        return
    for layer, chosen in zip(structure.layers, _tiers(tier, len(structure.layers)), strict=True):
        module = model.get_submodule(layer.path)
        original = _original(type(module))
        if chosen == 0 or _reason(model, structure, layer):
            narrow(module)
            module.__class__ = original
            continue
        module.__class__ = _lean_class(FAMILIES[structure.family], original)
        module.petl_tier, module.petl_pre_norm, module.petl_path = chosen, structure.pre_norm, layer.path
        module.petl_bound = [None]  # in a list: what changes in it is no change of the layer
    widen(model)


def widen(model: nn.Module) -> None:
    """Give lean layers room for the active adapter in their weights: for a parallel one in those of the feed-forward
    network, for LoRA in those of attentions, where q, k and v then stand together.

    Streamed layers have none: their weights' memory is not theirs. Where a parallel adapter has gone, so does its room.
    """
    lean = {path: module for path, module in model.named_modules() if isinstance(module, LeanLayer)}
    if not lean:
        return
    streamed = getattr(model, "petl_streamed", None)
    for layer in describe(model).layers:
        module = lean.get(layer.path)
        if module is None or (streamed is not None and layer.path in streamed.paths):
            continue
        module.petl_borders = {} if module.petl_borders is None else module.petl_borders
        module.renew_borders()
        linears = [model.get_submodule(path) for path in layer.ffn.linears]
        if not bottleneck_beside(model, layer):
            _narrow_ffn(module)
            continue
        modules = *linears, linears[-1].petl.current()
        if module.petl_wide is None or not module.petl_wide.serves(*modules):
            module.petl_wide = WideFFN(*modules)


def narrow(layer: nn.Module) -> None:
    """Undo ``widen`` for one layer."""
    for border in (getattr(layer, "petl_borders", None) or {}).values():
        border.undo()
    if isinstance(layer, LeanLayer):
        layer.petl_bound[0] = layer.petl_borders = None
    _narrow_ffn(layer)


def _narrow_ffn(layer: nn.Module) -> None:
    if getattr(layer, "petl_wide", None) is not None:
        layer.petl_bound[0] = None
        layer.petl_wide.undo()
        layer.petl_wide = None


def layer_states(model: nn.Module) -> list[LayerState]:
    """One entry a layer, encoder first; one for the whole model where it is of another kind."""
    try:
        structure = describe(model)
    except InputError as error:
        name = type(model).__name__
        return [LayerState(name, 0, str(error).removeprefix(f"model {name}: "))]
    return [_state(model, structure, layer) for layer in structure.layers]


def _state(model: nn.Module, structure: Structure, layer: Layer) -> LayerState:
    module = model.get_submodule(layer.path)
    if not isinstance(module, LeanLayer):
        return LayerState(layer.path, 0, _reason(model, structure, layer))
    obstacle = _replaced(module) or _obstacle(module)
    if obstacle:
        return LayerState(layer.path, 0, obstacle)
    weight = model.get_submodule(layer.attentions[0].q).weight
    rule = module.bound().found(module, torch.empty(0, dtype=weight.dtype), len(layer.attentions) > 1)
    return LayerState(layer.path, module.petl_tier, "", rule if isinstance(rule, str) else "")


def _tiers(tier: int | Sequence[int], layers: int) -> list[int]:
    single = isinstance(tier, (int, str)) or not isinstance(tier, Sequence)
    tiers = [tier] * layers if single else list(tier)
    for value in [tier] if single else tiers:
        if isinstance(value, bool) or not isinstance(value, int) or value not in (0, *TIERS):
            raise InputError(f"tier {shown(value)}: expected 1 to 5, 0 for the plain layer, or 'auto'")
    if layers and len(tiers) != layers:
        raise InputError(f"tier: {len(tiers)} of them, expected one for each of the {layers} layers, encoder first")
    return tiers


def _original(cls: type) -> type:
    """The class that a layer had before it was lean."""
    return getattr(cls, "petl_bases", (None, cls))[1]


@functools.cache
def _lean_class(mixin: type, original: type) -> type:
    # the name stays: transformers and accelerate know layers by the names of their classes
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (LeanLayer, mixin, original), {**members, "petl_bases": (mixin, original)})


def _bare(mixin: type, original: type) -> nn.Module:
    cls = _lean_class(mixin, original)
    return cls.__new__(cls)


# ---- what cannot be lean --------------------------------------------------------------------------------------------


def _reason(model: nn.Module, structure: Structure, layer: Layer) -> str:
    """Why this layer of a known family cannot be lean, from how it is built."""
    module = model.get_submodule(layer.path)
    family = FAMILIES[structure.family]
    return family.uncovered(module) or _unknown(family, _original(type(module)))


def _unknown(family: type, cls: type) -> str:
    """Why no lean layer of ``family`` stands for the ``forward`` of ``cls``; empty when one does."""
    if class_of(cls.forward) in family.known:
        return ""
    return f"{cls.__name__} has a forward of its own, which no lean layer stands for"


def _obstacle(layer: LeanLayer) -> str:
    """What about the layer now lets its own forward run; empty when nothing does."""
    family, original = type(layer).petl_bases
    if hooked_all():
        return "a hook on all modules"
    return (
        _unknown(family, original)
        or _changed_part(family, layer)
        or _watched(layer)
        or next((f"dropout {rate}, expected less than 1" for rate in family.rates(layer) if rate >= 1), "")
        or next((f"dropout {rate}, expected {RATES}" for rate in family.rates(layer) if not has_mask(rate)), "")
    )


@torch.compiler.assume_constant_result
def _obstacle_of_graph(layer: LeanLayer) -> str:
    """The obstacle when a graph is made: as for PyTorch's own calls, what is hooked later is not in it."""
    return _obstacle(layer)


def _replaced(layer: LeanLayer) -> str:
    """Why a call of the layer does not reach its lean forward; empty when it does."""
    if "forward" not in layer.__dict__:
        return ""
    wrapped = getattr(layer, "_old_forward", None)  # accelerate's hooks: they came after, and call it
    return "" if getattr(wrapped, "__func__", None) is type(layer).forward else "another forward is in its place"


def _changed_part(family: type, layer: LeanLayer) -> str:
    """A part that is read and not called, and is not what the lean forward takes it for; empty when all are."""
    for name, part, classes in family.parts(layer):
        if class_that_runs(part) not in classes:
            what = type(part).__name__
            return f"{name} is a {what}{' with another forward' if what in classes else ''}"
        if hasattr(part, "weight") and part._parameters.get("weight") is None:
            return f"{name} has no weight of its own"
        config = getattr(part, "config", None)
        if config is not None and attention_implementation(config) not in ATTENTIONS:
            return f"attention implementation {attention_implementation(config)!r}, expected eager or sdpa"
    return ""


def _watched(module: nn.Module, path: str = "") -> str:
    """A hook, another forward or a parametrization on something inside of ``module``; empty when there is none."""
    for name, part in module._modules.items():
        if part is None:
            continue
        own = part.__dict__
        if any(map(is_foreign, hooks_on(part))):
            return f"a hook on {path}{name}"
        if "forward" in own:
            return f"{path}{name} is a {type(part).__name__} with another forward"
        if "parametrizations" in part._modules:
            return f"a parametrization of {path}{name}"
        found = _watched(part, f"{path}{name}.") if part._modules else ""
        if found:
            return found
    return ""
