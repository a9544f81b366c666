"""A lean layer: the module of a model's layer, of a class with a lean ``forward`` before the layer's own.

``layer.petl_lean`` has all that such a layer has beside its own modules, parameters and settings.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.layers.blocks import ExpertsBlock
from petl_kernels.layers.border import Border, groups_of, renew
from petl_kernels.layers.boundaries import is_packed
from petl_kernels.layers.experts import experts_block
from petl_kernels.layers.hooks import hooked_all
from petl_kernels.layers.mixed_in import Mixin, bare, mixed, original_class
from petl_kernels.layers.obstacles import family_of, obstacle, obstacle_of_graph
from petl_kernels.layers.op_by_op import Attended, attention_block, feed_forward_block
from petl_kernels.layers.recompute import checkpointed, forget, forget_all, saving
from petl_kernels.layers.rotary import Rotary
from petl_kernels.layers.rule import Call, Rule, Unknown, Watch
from petl_kernels.layers.uncompiled import uncompiled
from petl_kernels.layers.wide_ffn import WideFFN
from petl_kernels.methods.adapter import ParallelAdapter
from petl_kernels.models.transformers_names import cache_in, fill_cache, takes_first_tokens

if TYPE_CHECKING:
    from petl_kernels.layers.families.family import Family


@dataclass(eq=False)
class Lean:
    """The state of a lean layer, its ``petl_lean``.

    tier: 1 to 5. path: that of the layer in its model, for errors. pre_norm: whether norms stand before the blocks.
    borders: by group of linears; None where the weights' memory is not the layer's (a streamed one's, a replica's).
    wide: the buffers of the feed-forward network with a parallel adapter. bound: the layer's obstacle and rules.
    """

    tier: int
    path: str
    pre_norm: bool
    borders: dict[str, Border] | None = None
    wide: WideFFN | None = None
    bound: Bound | None = field(default=None, repr=False)

    def of_copy(self, has_borders: bool) -> Lean:
        """Returns the state of a copy of the layer, whose weights are in no buffer."""
        return Lean(self.tier, self.path, self.pre_norm, {} if has_borders else None)

    def widen(self, first: nn.Linear, out: nn.Linear, adapter: ParallelAdapter) -> None:
        """Moves the weights of a feed-forward network, whose first and last linear these are, into buffers with room
        for its adapter, where they are not."""
        if self.wide is None or not self.wide.serves(first, out, adapter):
            self.narrow_ffn()
            self.bound, self.wide = None, WideFFN(first, out, adapter)

    def narrow(self) -> None:
        """Gives all weights memory of their own; they stay there until the layer is widened."""
        for border in (self.borders or {}).values():
            border.undo()
        self.bound = self.borders = None
        self.narrow_ffn()

    def narrow_ffn(self) -> None:
        """Gives the weights of the feed-forward network memory of their own."""
        if self.wide is not None:
            self.wide.undo()
            self.bound = self.wide = None


class LeanLayer(Mixin):
    """Mixed in before the family's class, which is mixed in before the layer's own."""

    petl_lean: Lean

    if TYPE_CHECKING:  # what it has of the family
        blocks = Family.blocks
        after_block = Family.after_block
        finished = Family.finished
        layer_index = Family.layer_index

    def run(
        self,
        kwargs: dict[str, Any],
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | Rotary | None,
        source: Tensor | None,
        source_mask: Tensor | None,
    ) -> Tensor:
        """Returns the layer's output (batch, tokens, d) of x, after ``steps_aside`` has returned False.

        bias: the position bias, or the rotation of positions. A cache among ``kwargs`` gets the keys and values that
        the layer's own forward puts there.
        """
        cache = cache_in(kwargs)
        tier = self.petl_lean.tier if torch.is_grad_enabled() else 0
        rule = self._rule(x, crosses=source is not None)
        if rule is not None:
            y, *keys = rule(Call(tier, x), x, mask, bias, source, source_mask, cache is not None)
            if rule.experts is not None:
                y = experts_block(self, rule.experts, y, mask, tier)
            y = self.finished(y)
        elif tier == 0:
            y, *keys = self.op_by_op(x, mask, bias, source, source_mask, 0)
        elif tier < 4:
            y, *keys = _recomputing(self, x, mask, bias, source, source_mask, tier)
        else:
            whole = partial(_whole, self, cache is not None)
            y, *keys = checkpointed(self, whole, x, mask, bias, source, source_mask, offload=tier == 5)
        if cache is not None:
            fill_cache(cache, self.layer_index(), *keys)
        return y

    def op_by_op(
        self,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | Rotary | None,
        source: Tensor | None,
        source_mask: Tensor | None,
        tier: int,
    ) -> tuple[Tensor, ...]:
        """Returns the output, and k and v of each attention. tier: 0 saves what autograd saves; 1 to 3."""
        attentions, ffn = self.blocks(source is not None)
        keys: list[Tensor] = []
        inputs = Attended(None, mask, bias), Attended(source, source_mask)
        with saving(self) if tier > 0 else nullcontext():
            for attention, attended in zip(attentions, inputs, strict=False):
                x, k, v = attention_block(attention, x, attended, tier)
                x = self.after_block(x)
                keys += k, v
            if isinstance(ffn, ExpertsBlock):
                y = experts_block(self, ffn, x, mask, tier)
            else:
                y = feed_forward_block(ffn, x, tier)
            return self.finished(self.after_block(y)), *keys

    def steps_aside(self, kwargs: dict) -> bool:
        """Returns whether the layer's own forward runs: to generate with a cache, or where there is an obstacle."""
        cache = cache_in(kwargs)
        if cache is not None and not (torch.is_grad_enabled() and takes_first_tokens(cache, self.layer_index())):
            return True
        reason = obstacle_of_graph(self) if torch.compiler.is_compiling() else self.bound().obstacle
        return bool(kwargs.get("output_attentions")) or bool(reason) or hooked_all()

    def refuse_packed(self, mask: Tensor | None, kwargs: dict) -> None:
        """Raises InputError for a packed row, which the layer's own forward cannot read."""
        if is_packed(mask):
            reason = obstacle(self) or ("output_attentions" if kwargs.get("output_attentions") else "a cache")
            raise InputError(f"cu_seqlens: {self.petl_lean.path} reads no packed rows ({reason}); expected padded ones")

    def bound(self) -> Bound:
        """Returns the layer's obstacle and rules, made anew where the layer has changed."""
        found = self.petl_lean.bound
        if found is None or not found.watch.holds():
            self.petl_lean.bound = found = Bound(self)
        return found

    def _rule(self, x: Tensor, crosses: bool) -> Rule | None:
        """Returns the rule of the layer as it is now; None where it runs op by op."""
        if torch.compiler.is_compiling():  # a graph has rules of its own
            return None
        bound = self.petl_lean.bound
        return bound.rule(self, x, crosses)  # pyright: ignore[reportOptionalMemberAccess]  made by ``steps_aside``

    # ---- what PyTorch does to modules -------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        """Moves or casts each parameter alone, and puts them into buffers again."""
        lean = self.petl_lean
        lean.bound = None
        super()._apply(fn, recurse)
        if lean.wide is not None:
            lean.wide = lean.wide.moved()
        self.renew_borders()
        return self

    def renew_borders(self) -> None:
        """Moves the q, k and v that read one input into borders, where they can be and are not."""
        lean = self.petl_lean
        if lean.borders is not None:
            lean.bound = None
            renew(lean.borders, groups_of(self.blocks(True)[0]))

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Returns the module's, with copies of the weights in borders, as of tensors with memory of their own.

        Writers of files leave out, or refuse, all but one of the tensors that share memory.
        """
        found = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if not keep_vars:
            linears = (linear for border in (self.petl_lean.borders or {}).values() for linear in border.linears)
            together = {id(linear.weight) for linear in linears}
            for name, parameter in self.named_parameters(remove_duplicate=False):
                if id(parameter) in together:
                    found[prefix + name] = found[prefix + name].clone(memory_format=torch.contiguous_format)
        return found

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.petl_lean = self.petl_lean.of_copy(has_borders=False)
        return replica

    def __reduce_ex__(self, protocol):
        state = self.petl_lean.of_copy(has_borders=self.petl_lean.borders is not None)
        return bare, type(self).petl_bases, {**self.__dict__, "petl_lean": state}

    def __setstate__(self, state: dict) -> None:
        """Moves the weights of a copy into borders, as those of its original are."""
        super().__setstate__(state)
        self.renew_borders()


class Bound:
    """The obstacle and the rules of a lean layer, valid until ``watch`` finds a change."""

    def __init__(self, layer: LeanLayer):
        self.watch, self.obstacle = Watch(layer, family_of(layer).called(layer)), obstacle(layer)
        self._rules: dict[tuple, Rule | str] = {}

    def rule(self, layer: LeanLayer, x: Tensor, crosses: bool) -> Rule | None:
        """Returns the rule for inputs like x; None where there is none."""
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
            attentions, ffn = layer.blocks(crosses)
            return Rule(layer, layer.petl_lean.path, attentions, ffn, x)
        except Unknown as reason:
            return str(reason)


@uncompiled  # recipes are no part of a graph, which breaks here once a layer
def _recomputing(layer: LeanLayer, *inputs: Any) -> tuple[Tensor, ...]:
    try:
        outputs = layer.op_by_op(*inputs)
    except BaseException:
        forget_all()  # after too little memory a step is tried again
        raise
    forget()
    return outputs


def _whole(layer: LeanLayer, with_keys: bool, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    outputs = layer.op_by_op(x, *inputs, tier=0)
    return outputs if with_keys else outputs[:1]


def make_lean(module: Any, family: type, tier: int, path: str, pre_norm: bool) -> None:
    """Gives ``module``, a layer, a lean class of ``family``, in place; one that is lean already gets another tier."""
    if isinstance(module, LeanLayer):
        lean = module.petl_lean
        lean.tier, lean.path, lean.pre_norm, lean.bound = tier, path, pre_norm, None
        return
    module.__class__ = mixed(LeanLayer, family, type(module))
    module.petl_lean = Lean(tier, path, pre_norm)


def make_plain(module: nn.Module) -> None:
    """Undoes ``make_lean``; leaves any other module as it is."""
    if isinstance(module, LeanLayer):
        module.petl_lean.narrow()
        del module.petl_lean
        module.__class__ = original_class(type(module))
