"""The trained prefix of an attention: its keys and values, which a network makes while there is one.

    [P_k; P_v] = tanh(P' W_1ᵀ + b_1) W_2ᵀ + b_2,   P' (2 · length, heads · head_dim)

Keys and values are the rows of one product each way. The network works in the dtype of its parameters. It is shared:
each attention adds its own share to the gradients, and autograd adds up the shares.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petl_kernels.layers.hooks import hooks_on
from petl_kernels.layers.rule.call import Call, Gradients, Place
from petl_kernels.layers.rule.linears import Unknown
from petl_kernels.methods.prefix import Prefix
from petl_kernels.ops.common import accumulate_dtype


class TrainedPrefix:
    """One prefix as the rule reads it. Kept are keys and values in the dtype of products, and tanh's output."""

    def __init__(self, block: str, piece: Prefix):
        self.rows, self.hidden = Place(block, "prefix"), Place(block, "tanh")
        self.key, self.value, self.shape = piece.key, piece.value, (-1, piece.heads, piece.head_dim)
        self.mlp = () if piece.mlp is None else _parameters(*piece.mlp)
        self.bound = [self.key, self.value, *self.mlp]
        self.names = dict(zip(map(id, self.mlp), ("0.weight", "0.bias", "2.weight", "2.bias"), strict=False))

    def forward(self, dtype: torch.dtype, call: Call) -> tuple[Tensor, Tensor]:
        """Returns keys and values (length, heads, head_dim) in ``dtype``."""
        if not self.mlp:  # they are the parameters, or a cast of a few rows
            return self.key.to(dtype).view(self.shape), self.value.to(dtype).view(self.shape)
        rows = call.kept.get(self.rows.key)
        if rows is None:
            w1, b1, w2, b2 = self.mlp
            hidden = torch.addmm(b1, self._inputs(), w1.t()).tanh_()
            rows = torch.addmm(b2, hidden, w2.t()).to(dtype)
            call.keep(self.hidden, hidden)
            call.keep(self.rows, rows)
        key, value = rows.view(2, *self.key.shape).unbind()
        return key.view(self.shape), value.view(self.shape)

    def backward(self, dkey: Tensor, dvalue: Tensor, call: Call, gradients: Gradients) -> None:
        """Adds the gradients of what is trained; dkey and dvalue (length, heads, head_dim)."""
        if not self.mlp:
            gradients.add(self.key, dkey)
            gradients.add(self.value, dvalue)
            return
        if not any(map(gradients.wants, self.bound)):
            return
        w1, b1, w2, b2 = self.mlp
        hidden = call.kept[self.hidden.key]
        drows = torch.cat([dkey, dvalue]).view(-1, w2.shape[0]).to(w2.dtype)
        dhidden = torch.ops.aten.tanh_backward(drows @ w2, hidden)
        _add_linear(w2, b2, drows, hidden, gradients)
        _add_linear(w1, b1, dhidden, self._inputs(), gradients)
        if gradients.wants(self.key) or gradients.wants(self.value):
            own_key, own_value = (dhidden @ w1).view(2, *self.key.shape).unbind()
            gradients.add(self.key, own_key)
            gradients.add(self.value, own_value)

    def _inputs(self) -> Tensor:
        return torch.cat([self.key, self.value])


def _add_linear(weight: Tensor, bias: Tensor, dy: Tensor, x: Tensor, gradients: Gradients) -> None:
    if gradients.wants(weight):
        gradients.add(weight, dy.t() @ x)
    if gradients.wants(bias):
        gradients.add(bias, dy.sum(0, dtype=accumulate_dtype(dy.dtype)))


def _parameters(mlp: nn.Module) -> tuple[Tensor, ...]:
    """Returns W_1, b_1, W_2 and b_2 of a network that nobody has changed."""
    if [type(part) for part in mlp.children()] != [nn.Linear, nn.Tanh, nn.Linear] or type(mlp) is not nn.Sequential:
        raise Unknown("another network that makes a prefix")
    if any(hooks_on(part) or "forward" in part.__dict__ for part in mlp.modules()):
        raise Unknown("a hook on the network that makes a prefix")
    parameters = mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias
    if any(parameter is None for parameter in parameters):
        raise Unknown("another network that makes a prefix")
    return parameters
