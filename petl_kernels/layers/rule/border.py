"""Linear layers that read one input as one product, with their adapters in a border of its weights.

They are so where the weights stand in a ``Border`` and LoRA has no dropout. The product reads rows that begin with the
input and end with x Aᵀ: the norm before leaves room for that behind its output; any other input is copied into such
rows. The gradients of the outputs are handled in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from petl_kernels.layers.border import Border
from petl_kernels.layers.buffers import are_frozen
from petl_kernels.layers.rule.call import Call, Gradients, Place
from petl_kernels.ops.define import run
from petl_kernels.ops.lora_border import room
from petl_kernels.ops.room import copied_rows, whole_rows


class Bordered:
    """The linears of one ``Linears``, all in ``border``. room: columns behind the rows of the input."""

    def __init__(self, block: str, linears: Sequence[Any], border: Border):
        self.linears, self.latent = linears, Place(block, "latent0")
        weights = [linear.weight for linear in linears]
        self.sizes, self.inputs = [weight.shape[0] for weight in weights], weights[0].shape[1]
        self.a = [_a(linear) for linear in linears]
        self.b = [_b(linear) for linear in linears]
        self.scales = [linear.scale for linear in linears]
        self.ranks = sum(a.shape[0] for a in self.a)
        self.room, self.outputs = room(self.ranks), sum(self.sizes)
        self.buffer = border.buffer[: self.outputs + self.room, : self.inputs + self.room]
        nothing = weights[0].new_empty(0)
        self.biases = [nothing if linear.bias is None else linear.bias for linear in linears]
        self.bias = border.bias
        # Fake tensors, of a simulation, have no addresses.
        self.places = [(own, own.data_ptr()) for own in weights if not isinstance(own, FakeTensor)]
        # Backward reads the border, wherever the parameters are by then. A write to it changes the versions of these.
        self.watched = [(weight.detach(), weight) for weight in weights]
        others = (tensor for linear in linears for tensor in (linear.bias, *(linear.lora or ())))
        self.bound = [*(watched for watched, _ in self.watched), *(own for own in others if own is not None)]
        self.own_input = False  # whether the rows of the input may be written behind

    def holds(self) -> bool:
        """Returns whether the weights are still in the border."""
        return all(weight.data_ptr() == place for weight, place in self.places)

    def forward(self, x: Tensor, call: Call) -> list[Tensor]:
        """Returns the output of each linear, columns of one tensor."""
        wide = self._rows_of_input(x)
        y, latent = run(
            "lora_border", wide, self.buffer, self.bias, self.biases, self.a, self.b, self.scales, call.backend
        )
        if self.ranks:
            call.save(self.latent, latent)
        return list(y.view(*x.shape[:-1], self.outputs).split(self.sizes, -1))

    def backward(
        self, dys: list[Tensor], x: Tensor | None, call: Call, gradients: Gradients, need_dx: bool
    ) -> Tensor | None:
        """Returns dx where it is needed. x is None where no linear has LoRA."""
        need_dbias = [gradients.wants(linear.bias) for linear in self.linears]
        wide = self._rows_of_gradients(dys)
        latent = call.saved[self.latent.key] if self.ranks else wide.new_empty(wide.shape[0], 0)
        rows = x.reshape(-1, self.inputs) if self.ranks and x is not None else None
        own = self.buffer, self.a, self.b, self.scales, need_dx, need_dbias
        dx, das, dbs, dbiases = run("lora_border_backward", wide, rows, latent, *own, call.backend)
        for linear, da, db, dbias, need in zip(self.linears, das, dbs, dbiases, need_dbias, strict=True):
            if linear.lora is not None:
                gradients.add(linear.lora[0], da)
                gradients.add(linear.lora[1], db)
            if need:
                gradients.add(linear.bias, dbias)
        return dx.view(*dys[0].shape[:-1], self.inputs) if need_dx else None

    def _rows_of_input(self, x: Tensor) -> Tensor:
        """Returns rows (tokens, K + room) that begin with x."""
        if not self.room:
            return x.reshape(-1, self.inputs)
        wide = whole_rows([x], self.room) if self.own_input else None
        return copied_rows([x], self.room) if wide is None else wide

    def _rows_of_gradients(self, dys: list[Tensor]) -> Tensor:
        """Returns rows (tokens, N + room) that begin with ``dys``, side by side."""
        wide = whole_rows(dys, self.room)
        return copied_rows(dys, self.room) if wide is None else wide


def bordered(
    block: str, linears: Sequence[Any], modules: Sequence[nn.Linear], border: Border | None
) -> Bordered | None:
    """Returns ``linears``, those of ``modules``, as one product; None where ``border`` is None or cannot serve them."""
    if border is None or not border.serves(modules):
        return None
    plain = all(linear.before is None and linear.after is None and linear.dropout == 0 for linear in linears)
    ranks = sum(linear.lora[0].shape[0] for linear in linears if linear.lora is not None)
    fits = border.buffer.shape[1] - modules[0].in_features >= room(ranks)
    return Bordered(block, linears, border) if plain and fits else None


def release_trained(modules: Sequence[nn.Linear], border: Border | None) -> None:
    """Gives weights in ``border`` that are trained by now memory of their own, as optimisers expect it."""
    if border is not None and tuple(modules) == border.linears and not are_frozen(own.weight for own in modules):
        border.undo()


def _a(linear) -> Tensor:
    return linear.weight.new_empty(0, linear.weight.shape[1]) if linear.lora is None else linear.lora[0]


def _b(linear) -> Tensor:
    return linear.weight.new_empty(linear.weight.shape[0], 0) if linear.lora is None else linear.lora[1]
