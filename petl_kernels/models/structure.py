"""The anatomy of a sequence-to-sequence model: paths of its layers, attentions, feed-forward blocks and norms.

Four families, told apart by what their layers hold and not by class, so that nothing of transformers is imported:

- "bart": M2M-100, NLLB, mBART, BART, Marian. ``layers.i`` with self_attn, encoder_attn, fc1, fc2 and LayerNorms.
- "t5": T5, ByT5, mT5, Aya-101, UMT5, MADLAD-400. ``block.i.layer.j`` with SelfAttention, EncDecAttention,
  DenseReluDense and RMSNorms.
- "m4t": SeamlessM4T's text side and NLLB-MoE. ``layers.i`` with self_attn, cross_attention, ffn and LayerNorms.
- "gemma": T5Gemma. ``layers.i`` with self_attn, cross_attn, mlp, and RMSNorms before and behind each block. T5Gemma 2
  has one attention in place of the two, and its text side is described alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from petl_kernels.errors import InputError, shown
from petl_kernels.models.added import AddedModules, AddedParameters
from petl_kernels.models.transformers_names import feed_forward_norm, has_experts, heads_of

_EXPECTED = (
    "expected an encoder-decoder of the BART family (M2M-100, NLLB, mBART, Marian), "
    "of the T5 family (T5, mT5, UMT5, MADLAD-400), NLLB-MoE, SeamlessM4T's text to text, T5Gemma or T5Gemma 2"
)


@dataclass(frozen=True)
class Attention:
    """One attention. ``kind``: "encoder" and "decoder" are self-attentions, "cross" reads the encoder's output.

    heads: those of keys and values, which several heads of queries may share (T5Gemma).
    """

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
    """One feed-forward block; ``inputs`` are the linears that read its input (two when it is gated).

    A block of experts has none of them, and ``out`` is the module whose output is the block's.
    """

    inputs: tuple[str, ...]
    out: str
    norm: str

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.inputs, self.out) if self.inputs else ()


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
    """Returns the structure of ``model``. Raises InputError for what is no encoder-decoder of the four families."""
    for family, stack_name, part, layer in _FAMILIES:
        found = {side: _find_stack(model, side, stack_name, part) for side in ("encoder", "decoder")}
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
        pre_norm = family != "bart" or hasattr(model.get_submodule(sides["encoder"]), "layer_norm")
        d_model, other = (_out_features(model, layer.attentions[0].out) for layer in (layers[0], layers[-1]))
        if other != d_model:
            name = type(model).__name__
            raise InputError(f"model {name}: {d_model} wide in its encoder and {other} in its decoder; expected one")
        return Structure(family, d_model, pre_norm, layers)
    raise InputError(f"model {type(model).__name__}: {_EXPECTED}")


def _find_stack(model: nn.Module, side: str, stack_name: str, part: str) -> str | None:
    """Returns the path of the side's stack, whose layers have a module ``part``; None where there is none.

    Its name is that of the side, alone or behind "text_", or "text_model" inside of the side.
    """
    for path, module in model.named_modules():
        stack = getattr(module, stack_name, None)
        parent, _, name = path.rpartition(".")
        named = name.removeprefix("text_") == side or (name == "text_model" and parent.rpartition(".")[2] == side)
        if named and isinstance(stack, nn.ModuleList) and len(stack) and hasattr(stack[0], part):
            return path
    return None


def _attentions(
    module: Any, path: str, side: str, cross: str, norm: str = "{}_layer_norm", out: str = "out"
) -> tuple[Attention, ...]:
    """Returns the self-attention of a layer, and its cross-attention ``cross`` where it has one.

    norm: the name of an attention's norm, with {} for that of the attention. out: that of its output projection, before
    "_proj", as those of q, k and v.
    """
    found = []
    for kind, name in ((side, "self_attn"), ("cross", cross)):
        if hasattr(module, name):
            at = f"{path}.{name}"
            q, k, v, o = (f"{at}.{own}_proj" for own in ("q", "k", "v", out))
            heads, head_dim = heads_of(getattr(module, name))
            found.append(Attention(kind, at, q, k, v, o, f"{path}.{norm.format(name)}", heads, head_dim))
    return tuple(found)


def _bart_layer(model: nn.Module, side: str, path: str) -> Layer:
    attentions = _attentions(model.get_submodule(path), path, side, "encoder_attn")
    ffn = FeedForward((f"{path}.fc1",), f"{path}.fc2", f"{path}.final_layer_norm")
    return Layer(side, path, attentions, ffn)


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


def _m4t_layer(model: nn.Module, side: str, path: str) -> Layer:
    module: Any = model.get_submodule(path)
    attentions, norm = _attentions(module, path, side, "cross_attention"), f"{path}.{feed_forward_norm(module)}"
    if has_experts(module):
        return Layer(side, path, attentions, FeedForward((), f"{path}.ffn", norm))
    return Layer(side, path, attentions, FeedForward((f"{path}.ffn.fc1",), f"{path}.ffn.fc2", norm))


def _gemma_layer(model: nn.Module, side: str, path: str) -> Layer:
    attentions = _attentions(model.get_submodule(path), path, side, "cross_attn", "pre_{}_layernorm", "o")
    inputs = (f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj")
    ffn = FeedForward(inputs, f"{path}.mlp.down_proj", f"{path}.pre_feedforward_layernorm")
    return Layer(side, path, attentions, ffn)


# The name of each family, the list of layers in its stacks, what a layer of it has, and how one is read.
_FAMILIES = (
    ("bart", "layers", "fc1", _bart_layer),
    ("t5", "block", "layer", _t5_layer),
    ("m4t", "layers", "ffn", _m4t_layer),
    ("gemma", "layers", "pre_self_attn_layernorm", _gemma_layer),
)


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
