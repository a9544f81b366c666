"""Bytes that live as long as a run: frozen weights by storage, gradients, and moments of the optimiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from petl_kernels.layers.border import border_bytes
from petl_kernels.layers.wide_ffn import room_bytes
from petl_kernels.models.structure import Layer, Structure, describe
from petl_kernels.ops.quantized import QuantizedTensor, parts_of, storage_bytes
from petl_kernels.planning.levers import STORAGES
from petl_kernels.weights.quantized import is_table, quantizable, storages_of

_Bytes = Callable[[Tensor], int]  # of a trained parameter

# Bytes of a trained parameter's gradient between micro-batches, by dtype.
GRADIENT_BYTES: dict[str, _Bytes] = {"float32": lambda p: p.nbytes, "bfloat16": lambda p: 2 * p.numel()}
# bitsandbytes keeps the moments of parameters with fewer values in fp32.
SMALLEST_8BIT = 4096
# Bytes of a trained parameter's two moments: in its dtype, or in 8 bits with an fp32 scale for each block of 256.
OPTIMIZER_BYTES: dict[str, _Bytes] = {
    "adamw": lambda p: 2 * p.nbytes,
    "adamw8bit": lambda p: 2 * (p.numel() + 4 * -(-p.numel() // 256)) if p.numel() >= SMALLEST_8BIT else 8 * p.numel(),
}
# Bytes that an optimiser's step allocates for one parameter and frees, by the counts of the CPU's allocator. PyTorch's
# fused AdamW has no temporaries, nor have bitsandbytes' CUDA kernels; on the CPU bitsandbytes widens moments and
# gradient to fp32.
STEP_BYTES: dict[tuple[str, str], _Bytes] = {
    ("adamw8bit", "cpu"): lambda p: (
        p.numel() * ((20 if p.numel() >= SMALLEST_8BIT else 12) + (4 if p.dtype.itemsize == 2 else 0))
    ),
}
SLOTS = 2  # layers that streaming has on the device at once


class FrozenWeights:
    """The bytes of a model's frozen weights in each storage, by layer and in all.

    can_round, can_stream: whether some weight can be quantized, and whether each layer has weights to stream.
    storages: in which the model holds its layers and its tables already; "dense" where nothing is quantized.
    dtype: of the largest frozen weight, fp32 without one.
    """

    def __init__(self, model: nn.Module, structure: Structure, device: str):
        """device: the kind of device that the model will be on, "cpu" or "cuda"."""
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        places = quantizable(model)
        self.storages = storages_of(model)
        can_round = {id(owners[0].weight) for owners in places}
        in_tables = {id(owners[0].weight) for owners in places if is_table(model, owners)}
        self._numel = {name: p.numel() for name, p in frozen.items()}
        self._bytes = {
            storage: {name: _stored(p, storage if id(p) in can_round else "dense") for name, p in frozen.items()}
            for storage in STORAGES
        }
        tables = {name for name, p in frozen.items() if id(p) in in_tables}
        self._dense = {
            place: sum(p.numel() * p.dtype.itemsize for name, p in frozen.items() if (name in tables) == place)
            for place in (False, True)
        }
        self._in_tables = {storage: sum(self._bytes[storage][name] for name in tables) for storage in STORAGES}
        self._in_layers = {
            storage: sum(self._bytes[storage].values()) - self._in_tables[storage] for storage in STORAGES
        }
        self._buffers = sum(buffer.nbytes for buffer in model.buffers())
        self._rooms = [room_bytes(model, layer) + border_bytes(model, layer, device) for layer in structure.layers]
        self.layers = [_streamable(model, layer) for layer in structure.layers]
        self.can_round, self.can_stream = bool(can_round), all(self.layers)
        self.dtype = max(frozen.values(), key=lambda p: p.numel()).dtype if frozen else torch.float32

    def stored(self, storage: str, tables: str) -> int:
        """Returns the bytes of all frozen weights: those of tables in ``tables``, the others in ``storage``."""
        return self._in_layers[storage] + self._in_tables[tables]

    def widened(self, storage: str, tables: str) -> int:
        """Returns the dense bytes of what is quantized."""
        return (0 if storage == "dense" else self._dense[False]) + (0 if tables == "dense" else self._dense[True])

    def layer_sizes(self, storage: str, count: int) -> list[int]:
        """Returns the bytes that streaming takes out of each of the first ``count`` layers."""
        return [sum(self._bytes[storage][name] for name in names) for names in self.layers[:count]]

    def values(self, layer: int) -> int:
        """Returns how many values streaming takes out of a layer."""
        return sum(self._numel[name] for name in self.layers[layer])

    def resident(self, storage: str, tables: str, streamed: int) -> int:
        """Returns the bytes on the device: without the streamed layers, with the slots that they travel through, and
        with the room that dense weights have for a parallel adapter or for LoRA."""
        layers = self.layer_sizes(storage, streamed)
        slots = min(SLOTS, streamed) * max(layers, default=0)
        rooms = sum(self._rooms[streamed:]) if storage == "dense" else 0
        return self.stored(storage, tables) - sum(layers) + slots + rooms + self._buffers


def streamed_weights(model: nn.Module, layers: int) -> list[str]:
    """Returns the names of the frozen weights of the first ``layers`` layers, encoder first: what streaming takes."""
    return [name for layer in describe(model).layers[:layers] for name in _streamable(model, layer)]


def _streamable(model: nn.Module, layer: Layer) -> list[str]:
    names = sorted(f"{path}.weight" for block in (*layer.attentions, layer.ffn) for path in block.linears)
    return [name for name in names if not model.get_parameter(name).requires_grad]


def _stored(weight: nn.Parameter, storage: str) -> int:
    if storage == "dense" or isinstance(weight, QuantizedTensor):  # one that is quantized stays as it is
        return sum(tensor.nbytes for tensor in parts_of(weight))
    return storage_bytes(tuple(weight.shape), storage, weight.dtype)
