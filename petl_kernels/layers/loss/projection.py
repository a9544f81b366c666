"""The output projection of one forward pass: its operands, from which logits are computed when they are read."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CrossEntropy = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float, str], Tensor]
# What Gemma's models do to logits, step by step: divide by a number t, take tanh, multiply by t.
Steps = tuple[tuple[str, float], ...]


class ForwardPass:
    """One forward pass of a model with labels.

    While it is ``running``, the sum of logits and a bias, a cap on them, and their cross-entropy, need no values
    either. The latter is ``cross_entropy(hidden, weight, labels, bias, softcap, reduction)``, with a row of hidden for
    each label.
    """

    def __init__(self, cross_entropy: CrossEntropy):
        self.running = True
        self.cross_entropy: CrossEntropy | None = cross_entropy

    def end(self) -> None:
        self.running, self.cross_entropy = False, None


class Projection:
    """The operands of logits: ``hidden`` (..., d), ``weight`` (words, d), ``bias`` (1, words) or None.

    steps: what is done to their sum, in order: ("divide", t), ("tanh", 1.0) and ("multiply", t). Autocast and inference
    mode are those of the time when it is made.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, forward: ForwardPass):
        self.hidden, self.weight, self.bias = hidden, weight, None
        self.steps: Steps = ()
        self.forward = forward
        self.autocast = autocast_now(hidden.device.type)
        self.inference = torch.is_inference_mode_enabled()
        self._seen = [("hidden states", hidden, _state(hidden)), ("weight", weight, _state(weight))]

    def with_bias(self, bias: Tensor) -> Projection:
        """Returns the same projection with ``bias`` added."""
        other = Projection.__new__(Projection)
        other.__dict__.update(self.__dict__, bias=bias, _seen=[*self._seen, ("bias", bias, _state(bias))])
        return other

    def with_step(self, name: str, number: float = 1.0) -> Projection:
        """Returns the same projection with one more of the ``steps``."""
        other = Projection.__new__(Projection)
        other.__dict__.update(self.__dict__, steps=(*self.steps, (name, number)))
        return other

    @property
    def softcap(self) -> float | None:
        """The t of t · tanh(logits / t), 0 for logits as they are; None where the steps are no such cap."""
        if not self.steps:
            return 0.0
        t = self.steps[0][1]
        return t if self.steps == (("divide", t), ("tanh", 1.0), ("multiply", t)) and t > 0 else None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        on, dtype = self.autocast.keywords["enabled"], self.autocast.keywords["dtype"]
        product = dtype if on and self.hidden.dtype != torch.float64 else self.hidden.dtype
        return product if self.bias is None else torch.promote_types(product, self.bias.dtype)

    def logits(self, hidden: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Returns logits (..., words) of the given tensors, each in the place of the forward pass's own.

        Raises RuntimeError where a tensor of the forward pass has changed since.
        """
        for name, tensor, state in self._seen:
            if _state(tensor) != state:
                raise RuntimeError(
                    f"logits after pk.lean: the {name} of the output projection changed since the forward pass;"
                    " expected logits to be read before that"
                )
        hidden, weight = self.hidden if hidden is None else hidden, self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        with self.autocast():
            product = F.linear(hidden, weight)
            product = product if bias is None else product + bias
            for name, number in self.steps:
                product = _STEPS[name](product, number)
            return product


_STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "divide": lambda logits, number: logits / number,
    "tanh": lambda logits, _: torch.tanh(logits),
    "multiply": lambda logits, number: logits * number,
}


def autocast_now(device: str) -> functools.partial:
    """Returns a function to a context manager that sets the autocast state of now, for a later time."""
    options = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    return functools.partial(torch.autocast, device, **options, cache_enabled=False)


def _state(tensor: Tensor) -> tuple:
    """Returns values that change when a tensor is written to, or gets other memory."""
    version = 0 if tensor.is_inference() else tensor._version
    address = tensor.data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) else 0
    return version, address, tensor.device
