"""Bytes that are there all through a run: frozen weights by storage, what is trained, its gradients and moments."""

from __future__ import annotations

import torch
from torch import nn

from petl_kernels.layers.border import border_bytes
from petl_kernels.layers.wide_ffn import room_bytes
from petl_kernels.models.structure import Layer, Structure, describe
from petl_kernels.ops.quantized import parts_of, storage_bytes
from petl_kernels.weights.quantized import quantizable, storage_of

# What is kept free for rounding and fragmentation: of CUDA's caching allocator, and of the C library's.
SLACK = {"cuda": 0.04, "cpu": 0.01}
CONTEXT = 600 * 2**20  # of CUDA itself: kernels, cuBLAS, its handles; measured where there is a card
STORAGES = ("dense", "int8", "nf4")
GRADIENT_BYTES = {"float32": lambda p: p.nbytes, "bfloat16": lambda p: 2 * p.numel()}
# Of a trained parameter: two moments in its dtype, or in 8 bits with an fp32 scale for each block of 256. bitsandbytes
# keeps those of small parameters in fp32.
SMALLEST_8BIT = 4096
OPTIMIZER_BYTES = {
    "adamw": lambda p: 2 * p.nbytes,
    "adamw8bit": lambda p: 2 * (p.numel() + 4 * -(-p.numel() // 256)) if p.numel() >= SMALLEST_8BIT else 8 * p.numel(),
}
# What a step allocates for one parameter and frees, by the counts of the CPU's allocator. PyTorch's fused AdamW has no
# temporaries, nor have bitsandbytes' CUDA kernels; on the CPU bitsandbytes widens moments and gradient to fp32.
STEP_BYTES = {
    ("adamw8bit", "cpu"): lambda p: (
        p.numel() * ((20 if p.numel() >= SMALLEST_8BIT else 12) + (4 if p.dtype.itemsize == 2 else 0))
    ),
}
SLOTS = 2  # on the device, for streamed layers


class FrozenWeights:
    """The frozen weights of a model: bytes in each storage, by layer and in all."""

    def __init__(self, model: nn.Module, structure: Structure, device: str):
        """device: the kind of device that the model will be on."""
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        places = quantizable(model)
        can = {id(owners[0].weight) for owners in places}
        tables = {id(owners[0].weight) for owners in places if storage_of(model, owners, "dense", "table") == "table"}
        self.tables = [name for name, p in frozen.items() if id(p) in tables]
        self.dtype = max(frozen.values(), key=lambda p: p.numel()).dtype if frozen else torch.float32
        self.numel = {name: p.numel() for name, p in frozen.items()}
        self.buffers = sum(buffer.nbytes for buffer in model.buffers())
        self.bytes: dict[str, dict[str, int]] = {
            storage: {name: _stored(p, storage if id(p) in can else "dense") for name, p in frozen.items()}
            for storage in STORAGES
        }
        self._tables_of = {storage: sum(self.bytes[storage][name] for name in self.tables) for storage in STORAGES}
        self._layers_of = {
            storage: sum(self.bytes[storage].values()) - self._tables_of[storage] for storage in STORAGES
        }
        self.layers = [_streamable(model, layer) for layer in structure.layers]
        self.rooms = [room_bytes(model, layer) + border_bytes(model, layer, device) for layer in structure.layers]
        self.can_round, self.can_stream = bool(can), all(self.layers)
        head = getattr(model, "lm_head", None)
        self.head = 0 if head is None else head.weight.numel()

    def stored(self, storage: str, tables: str) -> int:
        """Of all, with what is no table in ``storage``."""
        return self._layers_of[storage] + self._tables_of[tables]

    def widened(self, storage: str, tables: str) -> int:
        """Dense bytes of what is quantized."""
        layers = 0 if storage == "dense" else self._layers_of["dense"]
        return layers + (0 if tables == "dense" else self._tables_of["dense"])

    def layer_sizes(self, storage: str, count: int) -> list[int]:
        """Bytes of what streaming takes of each of the first ``count`` layers."""
        return [sum(self.bytes[storage][name] for name in names) for names in self.layers[:count]]

    def values(self, layer: int) -> int:
        return sum(self.numel[name] for name in self.layers[layer])

    def resident(self, storage: str, tables: str, streamed: int) -> int:
        """On the device: without the streamed layers, with the slots that they travel through, and with the room that
        dense weights have for a parallel adapter or for LoRA."""
        layers = self.layer_sizes(storage, streamed)
        slots = min(SLOTS, streamed) * max(layers, default=0)
        rooms = sum(self.rooms[streamed:]) if storage == "dense" else 0
        return self.stored(storage, tables) - sum(layers) + slots + rooms + self.buffers


def streamed_weights(model: nn.Module, layers: int) -> list[str]:
    """Names of the frozen weights of the first ``layers`` layers, encoder first: what streaming takes."""
    return [name for layer in describe(model).layers[:layers] for name in _streamable(model, layer)]


def _streamable(model: nn.Module, layer: Layer) -> list[str]:
    names = sorted(f"{path}.weight" for block in (*layer.attentions, layer.ffn) for path in block.linears)
    return [name for name in names if not model.get_parameter(name).requires_grad]


def _stored(weight: nn.Parameter, storage: str) -> int:
    parts = parts_of(weight)
    if storage == "dense" or len(parts) > 1:  # one that is quantized stays as it is
        return sum(part.nbytes for part in parts)
    return storage_bytes(tuple(weight.shape), storage, weight.dtype)
