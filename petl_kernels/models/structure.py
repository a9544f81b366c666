"""The anatomy of a sequence-to-sequence model: paths of its layers, attentions, feed-forward blocks and norms.

Two families, told apart by what their layers hold and not by class, so that nothing of transformers is imported:

- "bart": M2M-100, NLLB, mBART, BART, Marian. ``layers.i`` with self_attn, encoder_attn, fc1, fc2 and LayerNorms.
- "t5": T5, ByT5, mT5, Aya-101, UMT5, MADLAD-400. ``block.i.layer.j`` with SelfAttention, EncDecAttention,
  DenseReluDense and RMSNorms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from petl_kernels.errors import InputError, shown
from petl_kernels.models.added import AddedModules, AddedParameters
from petl_kernels.models.transformers_names import heads_of

_EXPECTED = (
    "expected an encoder-decoder of the BART family (M2M-100, NLLB, mBART, Marian) "
    "or of the T5 family (T5, mT5, UMT5, MADLAD-400)"
)


@dataclass(frozen=True)
class Attention:
    """One attention. ``kind``: "encoder" and "decoder" are self-attentions, "cross" reads the encoder's output."""

    kind: str
    path: str
    q: str
    k: str
    v: str
    out: str
    norm: str
    heads: int
    head_dim: int

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v, self.out)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block; ``inputs`` are the linears that read its input (two when it is gated)."""

    inputs: tuple[str, ...]
    out: str
    norm: str

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.inputs, self.out)


@dataclass(frozen=True)
class Layer:
    side: str  # "encoder" or "decoder"
    path: str
    attentions: tuple[Attention, ...]
    ffn: FeedForward


@dataclass(frozen=True)
class Structure:
    """The anatomy of one model.

    pre_norm: each block normalises its input; else the sum of its input and output, as Marian does.
    """

    family: str
    d_model: int
    pre_norm: bool
    layers: tuple[Layer, ...]

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(attention for layer in self.layers for attention in layer.attentions)

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer inside the encoder's and decoder's layers."""
        return tuple(
            path for layer in self.layers for block in (*layer.attentions, layer.ffn) for path in block.linears
        )


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model {shown(model)}: expected a PyTorch module")


def describe(model: nn.Module) -> Structure:
    """Returns the structure of ``model``. Raises InputError for what is no encoder-decoder of the two families."""
    for family, stack_name, layer in (("bart", "layers", _bart_layer), ("t5", "block", _t5_layer)):
        found = {side: _find_stack(model, side, stack_name) for side in ("encoder", "decoder")}
        sides = {side: path for side, path in found.items() if path is not None}
        if len(sides) < 2:
            continue
        try:
            layers = tuple(
                layer(model, side, f"{path}.{stack_name}.{i}")
                for side, path in sides.items()
                for i in range(len(getattr(model.get_submodule(path), stack_name)))
            )
        except AttributeError as error:
            part = type(error.obj).__name__
            raise InputError(f"model {type(model).__name__}: its {part} has no {error.name}, {_EXPECTED}") from None
        pre_norm = family == "t5" or hasattr(model.get_submodule(sides["encoder"]), "layer_norm")
        d_model = _out_features(model, layers[0].ffn.out)
        return Structure(family, d_model, pre_norm, layers)
    raise InputError(f"model {type(model).__name__}: {_EXPECTED}")


def _find_stack(model: nn.Module, side: str, stack_name: str) -> str | None:
    for path, module in model.named_modules():
        stack = getattr(module, stack_name, None)
        if path.rpartition(".")[2] == side and isinstance(stack, nn.ModuleList) and len(stack):
            first = stack[0]
            if hasattr(first, "fc1" if stack_name == "layers" else "layer"):
                return path
    return None


def _bart_layer(model: nn.Module, side: str, path: str) -> Layer:
    module = model.get_submodule(path)

    def attention(kind: str, name: str) -> Attention:
        attn, at = getattr(module, name), f"{path}.{name}"
        q, k, v, out = (f"{at}.{p}_proj" for p in ("q", "k", "v", "out"))
        heads, head_dim = heads_of(attn)
        return Attention(kind, at, q, k, v, out, f"{path}.{name}_layer_norm", heads, head_dim)

    attentions = [attention(side, "self_attn")]
    if hasattr(module, "encoder_attn"):
        attentions.append(attention("cross", "encoder_attn"))
    ffn = FeedForward((f"{path}.fc1",), f"{path}.fc2", f"{path}.final_layer_norm")
    return Layer(side, path, tuple(attentions), ffn)


def _t5_layer(model: nn.Module, side: str, path: str) -> Layer:
    module: Any = model.get_submodule(path)
    blocks = module.layer

    def attention(kind: str, i: int, name: str) -> Attention:
        attn, at = getattr(blocks[i], name), f"{path}.layer.{i}.{name}"
        q, k, v, out = (f"{at}.{p}" for p in ("q", "k", "v", "o"))
        heads, head_dim = heads_of(attn)
        return Attention(kind, at, q, k, v, out, f"{path}.layer.{i}.layer_norm", heads, head_dim)

    attentions = [attention(side, 0, "SelfAttention")]
    if len(blocks) == 3:
        attentions.append(attention("cross", 1, "EncDecAttention"))
    last = len(blocks) - 1
    at = f"{path}.layer.{last}"
    inputs = [name for name in ("wi", "wi_0", "wi_1") if hasattr(blocks[last].DenseReluDense, name)]
    ffn = FeedForward(
        tuple(f"{at}.DenseReluDense.{name}" for name in inputs), f"{at}.DenseReluDense.wo", f"{at}.layer_norm"
    )
    return Layer(side, path, tuple(attentions), ffn)


def _out_features(model: nn.Module, path: str) -> int:
    linear: Any = model.get_submodule(path)
    return linear.out_features


def all_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Returns ``model.named_modules()``, which has no types in PyTorch."""
    return model.named_modules()


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields what ``named_modules`` does, without what adapters have added."""
    added = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, AddedModules))
    for path, module in model.named_modules():
        if not isinstance(module, AddedModules) and not f"{path}.".startswith(added):
            yield path, module


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the plain model's parameters by name, tied ones once and under their first name."""
    found: dict[str, nn.Parameter] = {}
    seen = set()
    for path, module in base_modules(model):
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                found[name] = parameter
    owner = getattr(model, "petl", None)
    for name in owner.added if isinstance(owner, AddedParameters) else ():
        found.pop(name, None)
    return found


def total_parameters(model: nn.Module) -> int:
    """Returns the number of parameters of the plain model, tied ones counted once."""
    return sum(parameter.numel() for parameter in base_parameters(model).values())


def norms(model: nn.Module) -> list[str]:
    """Returns the paths of every LayerNorm and RMSNorm."""
    names = ("LayerNorm", "RMSNorm")
    return [path for path, module in base_modules(model) if type(module).__name__.endswith(names)]


def set_parameter(model: nn.Module, path: str, parameter: nn.Parameter | None) -> None:
    """Puts ``parameter`` into ``model`` at the dotted ``path``; None leaves the module without one there."""
    owner, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
