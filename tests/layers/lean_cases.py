"""Small adapted models, ragged batches, and one step's loss and gradients by name."""

from __future__ import annotations

import copy
import inspect
import sys
import types

import torch
import torch.nn.functional as F
from methods.models import build
from torch import Tensor, nn
from transformers.models.t5gemma import modeling_t5gemma

import petl_kernels as pk
from petl_kernels.layers.lean import LeanLayer
from petl_kernels.methods import METHODS

TIERS = (1, 2, 3, 4, 5)
SETTINGS = {"lora": {"rank": 3}, "dora": {"rank": 3}, "prefix": {"length": 3}}
SETTINGS |= {key: {"bottleneck": 5} for key in ("adapter", "adapter-sublayer", "pfeiffer", "parallel")}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.15, "activation_dropout": 0.1}


def adapted(family: str, method: str, attention: str = "sdpa", dtype=torch.float64, **settings) -> nn.Module:
    """Returns a model in training mode, with every trained parameter away from its initial value."""
    model = build(family, attention, **settings).to(dtype)
    pk.adapt(model, METHODS[method](**SETTINGS.get(method, {})))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pk.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    if dtype == torch.float64:
        exact_rms_norms(model)
    return model.train()


def exact_rms_norms(model: nn.Module) -> None:
    """Makes the norms of T5 and T5Gemma exact: they take the mean square in fp32, in float64 too.

    The norms of this model get a forward that is, and is the same in fewer bits; other models keep transformers' own.
    T5Gemma's probabilities and logits are in fp32 as well: this model's are not.
    """
    for module in model.modules():
        is_norm = hasattr(module, "variance_epsilon") or type(module).__name__ in _GEMMA_NORMS
        if is_norm and type(module) not in _exact.values():
            cls = type(module)
            module.__class__ = _exact[cls] = _exact.get(cls) or _with_exact_forward(cls)
        if type(module).__name__ in ("T5GemmaSelfAttention", "T5GemmaCrossAttention"):
            module.attends_exactly = True
            sys.modules[type(module).__module__].eager_attention_forward = _gemma_attention
    if type(model).__name__ in ("T5GemmaForConditionalGeneration", "T5Gemma2ForConditionalGeneration"):
        model.loss_function = _exact_loss


def _exact_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs) -> Tensor:
    return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))


_own_gemma_attention = modeling_t5gemma.eager_attention_forward


def _gemma_attention(module, query, key, value, attention_mask, **kwargs):
    """T5Gemma's attention function, with the softmax in the dtype of the scores for modules that are to be exact."""
    if not getattr(module, "attends_exactly", False) or query.dtype != torch.float64:
        return _own_gemma_attention(module, query, key, value, attention_mask, **kwargs)
    shared, cap = query.shape[1] // key.shape[1], kwargs["softcap"]
    key, value = (own.repeat_interleave(shared, 1) for own in (key, value))
    scores = query @ key.mT * kwargs["scaling"]
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    output = F.dropout(weights, kwargs["dropout"], module.training) @ value
    return output.transpose(1, 2), weights


_GEMMA_NORMS = ("T5GemmaRMSNorm", "T5Gemma2RMSNorm")
_exact: dict[type, type] = {}  # by transformers' own


def _with_exact_forward(cls: type) -> type:
    """Returns a subclass that passes for code of transformers: lean layers step aside for any other."""
    function = _exact_gemma_norm if cls.__name__ in _GEMMA_NORMS else _exact_rms_norm
    code = function.__code__.replace(co_filename=inspect.getfile(cls))
    forward = types.FunctionType(code, globals(), "forward")
    forward.__qualname__ = f"{cls.__name__}.forward"
    members = {"__module__": cls.__module__, "forward": forward, "__reduce_ex__": _reduced}
    return type(cls.__name__, (cls,), members)


def _reduced(norm: nn.Module, protocol: int) -> tuple:
    return _bare_norm, (type(norm).__base__,), norm.__dict__


def _bare_norm(cls: type) -> nn.Module:
    exact = _exact[cls]
    return exact.__new__(exact)


def _exact_rms_norm(self, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    if self.weight.dtype in (torch.float16, torch.bfloat16):
        normalised = normalised.to(self.weight.dtype)
    return self.weight * normalised


def _exact_gemma_norm(self, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    gain = 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * gain).type_as(x)


def ragged(model: nn.Module, side: str = "right", rows: int = 3) -> dict[str, Tensor]:
    """Returns source and labels, both padded on ``side``."""
    generator = torch.Generator().manual_seed(11)
    source = torch.randint(3, 97, (rows, 7), generator=generator)
    labels = torch.randint(3, 97, (rows, 5), generator=generator)
    mask, decoder_mask = torch.ones_like(source), torch.ones_like(labels)
    row = torch.arange(rows)[:, None]
    for tensor in (mask, decoder_mask):
        width = tensor.shape[1]
        place = torch.arange(width).flip(0) if side == "right" else torch.arange(width)
        tensor[place[None] < row % 3] = 0
    source[mask == 0] = model.config.pad_token_id
    labels[decoder_mask == 0] = -100
    return {"input_ids": source, "attention_mask": mask, "decoder_attention_mask": decoder_mask, "labels": labels}


def step(model: nn.Module, inputs: dict[str, Tensor], seed: int = 5, **options) -> dict[str, Tensor]:
    """Returns the loss, and the gradient of every trained parameter, by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**inputs, **options).loss
    loss.sum().backward()
    values = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            values[name] = parameter.grad.clone()
    return values


def without_recomputation(model: nn.Module) -> nn.Module:
    """Returns a copy whose lean layers recompute nothing: autograd alone, with the same ops and random numbers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, LeanLayer):
            module.run = _Plainly(module)
    return model


class _Plainly:
    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, kwargs, *inputs):
        return self.layer.op_by_op(*inputs, 0)[0]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Returns the largest relative difference, and its name; the names must be the same."""
    assert found.keys() == expected.keys()
    scale = max(value.norm().item() for value in expected.values())

    def difference(name: str) -> float:
        size = max(expected[name].norm().item(), 1e-6 * scale)
        return ((found[name].double() - expected[name].double()).norm() / size).item()

    return max((difference(name), name) for name in expected)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the relative length of the difference over all gradients together."""
    names = [name for name in expected if name != "loss"]
    assert found.keys() == expected.keys()
    difference = sum((found[name].double() - expected[name]).square().sum() for name in names)
    return (difference / sum(expected[name].square().sum() for name in names)).sqrt().item()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    difference, name = worst(found, expected)
    assert difference < tolerance, (name, difference)


def borders(model: nn.Module) -> list[str]:
    """Returns the names of the borders of all layers, in their order."""
    layers = [module for module in model.modules() if isinstance(module, LeanLayer)]
    return [name for layer in layers for name in layer.petl_lean.borders or {}]


def wide(model: nn.Module) -> list[str]:
    """Returns the paths of the layers whose feed-forward network has an adapter inside."""
    layers = [module for module in model.modules() if isinstance(module, LeanLayer)]
    return [layer.petl_lean.path for layer in layers if layer.petl_lean.wide is not None]
