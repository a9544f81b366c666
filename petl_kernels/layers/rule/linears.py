"""Linear layers that read one input, with their adapters.

    y = ((x ⊙ l_in) Wᵀ + c + scale · drop(x) Aᵀ Bᵀ) ⊙ l_out + β

All but W may be absent: LoRA (A, B) beside a frozen W, (IA)³'s l before or after, SSF's l_out and β, the bias c. With
DoRA l_out is g = m / ‖W + scale · B A‖, and β is (1 - g) ⊙ c, as g leaves the bias out; both are in fp32 or wider.
W is frozen, dense or quantized, or trained. Linears with LoRA at one rate of dropout are one product with stacked A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from petl_kernels.layers.border import Border
from petl_kernels.layers.pieces import BOUND, active_piece, has_other_hooks
from petl_kernels.layers.rule.border import Bordered, bordered, release_trained
from petl_kernels.layers.rule.call import Call, Gradients, Place, summed
from petl_kernels.layers.wide_linear import WideLoRALinear
from petl_kernels.methods.ia3 import Scale
from petl_kernels.methods.lora import LoRALinear, LowRank
from petl_kernels.methods.ssf import ScaleShift
from petl_kernels.ops.define import accumulate_dtype, run
from petl_kernels.ops.quantized import parts_of


class Unknown(Exception):
    """Raised for something that the rule does not cover, named in the text: the layer then runs op by op."""


class Linear:
    """One linear layer, bound. name: that of its output among the saved tensors.

    piece: what an adapter other than LoRA, (IA)³ and SSF has put on it. after: l_out, or m of DoRA, which ``directed``
    says. bound: the tensors that backward reads.
    """

    def __init__(self, name: str, module: Any):
        if type(module) not in BOUND:
            raise Unknown(f"a {type(module).__name__} in the place of a linear layer")
        if has_other_hooks(module):
            raise Unknown("a hook on a linear layer")
        self.name = name
        self.weight: Tensor = module.weight
        self.bias: Tensor | None = module.bias
        self.parts = parts_of(self.weight)
        lora = _lora(module)
        self.lora: tuple[Tensor, Tensor] | None = None
        self.dropout, self.scale, self.directed = 0.0, 1.0, False
        if lora is not None:
            if self.weight.requires_grad:
                raise Unknown("LoRA on a weight that is trained")
            self.lora, self.scale = (lora.A, lora.B), float(lora.scale)
            self.dropout = lora.dropout if module.training else 0.0
        piece = active_piece(module)
        self.before: Tensor | None = piece.scale if isinstance(piece, Scale) and piece.feedforward else None
        self.after: Tensor | None = piece.scale if isinstance(piece, Scale) and not piece.feedforward else None
        self.shift: Tensor | None = None
        if isinstance(piece, ScaleShift):
            self.after, self.shift = piece.scale, piece.shift
        self.piece = None if isinstance(piece, (Scale, ScaleShift)) else piece
        if lora is not None and lora.magnitude is not None:
            if self.after is not None or self.before is not None:
                raise Unknown("DoRA on a linear layer that another adapter scales")
            self.after, self.directed = lora.magnitude, True
        own = [*self.parts, self.bias, self.before, self.after, self.shift]
        if self.lora is not None:
            own += self.lora
        self.bound = [tensor for tensor in own if tensor is not None]

    @property
    def reads_input(self) -> bool:
        """Whether backward reads the input."""
        return self.lora is not None or self.before is not None or self.weight.requires_grad

    def scaled(self, y: Tensor, call: Call) -> Tensor:
        """Returns y ⊙ l_out + β."""
        if self.directed:
            return self._directed(y, call)
        if self.after is not None:
            y = y * self.after.flatten().to(y.dtype)
        return y if self.shift is None else y.add_(self.shift.to(y.dtype))

    def _directed(self, y: Tensor, call: Call) -> Tensor:
        """Returns g ⊙ y + (1 - g) ⊙ c, rounded once."""
        factor = self._factor(call)
        if self.bias is None:
            return torch.mul(y, factor, out=torch.empty_like(y))
        return torch.addcmul((1 - factor) * self.bias, y, factor, out=torch.empty_like(y))

    def _factor(self, call: Call) -> Tensor:
        assert self.after is not None, "DoRA has m"
        return self.after / self.norms(call)

    def norms(self, call: Call) -> Tensor:
        """Returns ‖W + scale · B A‖ (out,) of DoRA in fp32 or wider, found once in a forward pass and its backward."""
        found = call.norms.get(self)
        if found is None:
            assert self.lora is not None, "DoRA is LoRA"
            found = call.norms[self] = run("lora_norm", self.parts, *self.lora, self.scale, call.backend)
        return found

    def scaled_backward(self, dy: Tensor, y: Tensor | None, call: Call, gradients: Gradients) -> Tensor:
        """Returns the gradient of y from that of y ⊙ l_out + β, and adds those of l_out (of m) and β.

        y: None without an l_out.
        """
        if gradients.wants(self.shift):
            gradients.add(self.shift, _summed_rows(dy))
        if self.after is None:
            return dy
        assert y is not None, "the output before l_out is there"
        if not self.directed:
            return _scale_backward(self.after, dy, y, gradients)
        factor, dfactor = self._factor(call), _summed_rows(dy * y)
        if self.bias is not None:  # its gradient through y comes with that of the product
            sums = _summed_rows(dy)
            dfactor -= sums * self.bias
            gradients.add(self.bias, (1 - factor) * sums)
        gradients.add(self.after, dfactor / self.norms(call))
        return torch.mul(dy, factor, out=torch.empty_like(dy))


def _lora(module: nn.Linear) -> LowRank | None:
    if type(module) not in (LoRALinear, WideLoRALinear):
        return None
    own: Any = module.lora
    return own.current()


class Group:
    """Linear layers with LoRA as one product with stacked A. latent: the place of x Aᵀ."""

    def __init__(self, block: str, i: int, linears: list[Linear]):
        self.latent, self.linears = Place(block, f"latent{i}"), linears
        self.dropout, self.before = linears[0].dropout, linears[0].before
        pairs = [linear.lora for linear in linears if linear.lora is not None]
        self.adapters = [a for a, _ in pairs], [b for _, b in pairs]
        nothing = pairs[0][0].new_empty(0)
        self.weights = [part for linear in linears for part in linear.parts]
        self.biases = [nothing if linear.bias is None else linear.bias for linear in linears]
        self.scales = [linear.scale for linear in linears]

    def forward(self, x: Tensor, call: Call) -> list[Tensor]:
        seed = call.seed(self.latent.key, self.dropout)
        rest = *self.adapters, self.scales, self.dropout, seed, call.backend
        ys, latent = run("lora_linear", _before(x, self), self.weights, self.biases, *rest)
        call.save(self.latent, latent)
        return ys

    def backward(self, dys: list[Tensor], x: Tensor, call: Call, gradients: Gradients, need_dx: bool) -> Tensor | None:
        needs_x = need_dx or gradients.wants(self.before)
        need_dbias = [gradients.wants(linear.bias) for linear in self.linears]
        seed, latent = call.seeds.get(self.latent.key), call.saved[self.latent.key]
        rest = *self.adapters, self.scales, self.dropout, seed, needs_x, need_dbias, call.backend
        dx, das, dbs, dbiases = run("lora_linear_backward", dys, _before(x, self), latent, self.weights, *rest)
        given = zip(self.linears, *self.adapters, das, dbs, dbiases, need_dbias, strict=True)
        for linear, a, b, da, db, dbias, need in given:
            gradients.add(a, da)
            gradients.add(b, db)
            if need:
                gradients.add(linear.bias, dbias)
        return _before_backward(self, dx, x, gradients) if needs_x else None


class Linears:
    """Linear layers that read the same x (..., K). border: the buffer of their weights, where they stand in one."""

    def __init__(self, block: str, named: dict[str, nn.Module], border: Border | None = None):
        self.all = [Linear(name, module) for name, module in named.items()]
        modules: list[Any] = list(named.values())
        release_trained(modules, border)
        self.bordered: Bordered | None = bordered(block, self.all, modules, border)
        apart = [] if self.bordered else self.all
        together: dict[tuple, list[Linear]] = {}
        for linear in apart:
            if linear.lora is not None:
                together.setdefault((linear.dropout, id(linear.before)), []).append(linear)
        self.groups = [Group(block, i, linears) for i, linears in enumerate(together.values())]
        self.plain = [linear for linear in apart if linear.lora is None]
        self.reads_input = any(linear.reads_input for linear in self.all)
        self.scales = any(linear.after is not None for linear in self.all)
        self.bound = [tensor for linear in apart for tensor in linear.bound]
        if self.bordered:
            self.bound = self.bordered.bound

    @property
    def room(self) -> int:
        """The number of columns that are written behind the rows of the input, and of the outputs' gradients."""
        return self.bordered.room if self.bordered else 0

    def forward(self, x: Tensor, call: Call) -> list[Tensor]:
        """Returns the output of each linear before l_out, in the order of ``named``."""
        if self.bordered:
            return self.bordered.forward(x, call)
        ys: dict[str, Tensor] = {}
        for group in self.groups:
            for linear, y in zip(group.linears, group.forward(x, call), strict=True):
                ys[linear.name] = y
        for linear in self.plain:
            ys[linear.name] = run("frozen_linear", _before(x, linear), linear.parts, linear.bias, call.backend)
        return [ys[linear.name] for linear in self.all]

    @overload
    def backward(
        self,
        dys: list[Tensor],
        x: Tensor | None,
        raw: Sequence[Tensor | None],
        call: Call,
        gradients: Gradients,
        need_dx: Literal[True],
    ) -> Tensor: ...
    @overload
    def backward(
        self,
        dys: list[Tensor],
        x: Tensor | None,
        raw: Sequence[Tensor | None],
        call: Call,
        gradients: Gradients,
        need_dx: bool,
    ) -> Tensor | None: ...
    def backward(
        self,
        dys: list[Tensor],
        x: Any,
        raw: Sequence[Any],
        call: Call,
        gradients: Gradients,
        need_dx: bool,
    ) -> Tensor | None:
        """Returns dx where it is needed.

        x: None where ``reads_input`` is False. raw: the outputs of ``forward``; None for linears without an l_out.
        """
        if self.bordered:
            return self.bordered.backward(dys, x, call, gradients, need_dx)
        own = {}
        for linear, dy, y in zip(self.all, dys, raw, strict=True):
            own[linear.name] = linear.scaled_backward(dy, y, call, gradients)
        dx = None
        for group in self.groups:
            grads = [own[linear.name] for linear in group.linears]
            dx = summed(dx, group.backward(grads, x, call, gradients, need_dx))
        for linear in self.plain:
            dx = summed(dx, _plain_backward(linear, own[linear.name], x, call, gradients, need_dx))
        return dx


def _plain_backward(linear: Linear, dy, x, call: Call, gradients: Gradients, need_dx: bool) -> Tensor | None:
    needs_x, need_dbias = need_dx or gradients.wants(linear.before), gradients.wants(linear.bias)
    dx, dbias = run("frozen_linear_backward", dy, linear.parts, needs_x, need_dbias, call.backend)
    if need_dbias:
        gradients.add(linear.bias, dbias)
    if gradients.wants(linear.weight):
        rows = dy.reshape(-1, dy.shape[-1])
        gradients.add(linear.weight, rows.T @ _before(x, linear).reshape(-1, x.shape[-1]))
    return _before_backward(linear, dx, x, gradients) if needs_x else None


def _before(x: Tensor, linear: Linear | Group) -> Tensor:
    return x if linear.before is None else x * linear.before.flatten().to(x.dtype)


def _before_backward(linear: Linear | Group, dx: Tensor, x: Tensor, gradients: Gradients) -> Tensor:
    return dx if linear.before is None else _scale_backward(linear.before, dx, x, gradients)


def _scale_backward(scale: Tensor, dy: Tensor, x: Tensor, gradients: Gradients) -> Tensor:
    """Returns dx of y = x ⊙ l, and adds the gradient of l."""
    if gradients.wants(scale):
        gradients.add(scale, _summed_rows(dy * x))
    return dy * scale.flatten().to(dy.dtype)


def _summed_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0, dtype=accumulate_dtype(x.dtype))
