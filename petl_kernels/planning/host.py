"""Bytes of host memory beside a CUDA device, by purpose."""

from __future__ import annotations

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods.owner import records
from petl_kernels.planning.plan import INPUTS, LOADING
from petl_kernels.planning.resident import FrozenWeights
from petl_kernels.units import format_below, format_least


def on_host(
    model: nn.Module, weights: FrozenWeights, storage: str, tables: str, streamed: int, inputs: int = 0, text: int = 0
) -> dict[str, int]:
    """Returns the bytes that stay in host memory, by purpose, and "while loading" all that are there at that time.

    While a checkpoint is loaded, all weights are in host memory, in their storage, with one tensor of the files or one
    streamed layer that is moved; after that only what stays there. inputs: those of tier 5. text: the tokenised one.
    Python and libraries are not counted.
    """
    layers, own = weights.layer_sizes(storage, streamed), own_values(model)
    parameters = list(model.parameters())
    moved = max(4 * max(p.numel() for p in parameters), max(layers, default=0))
    held = weights.stored(storage, tables) + sum(p.nbytes for p in parameters if p.requires_grad)
    held += sum(buffer.nbytes for buffer in model.buffers())
    stays = {"streamed layers": sum(layers), INPUTS: inputs, "the model's own values": own, "text": text}
    return {name: size for name, size in stays.items() if size} | {LOADING: held + moved + own + text}


def own_values(model: nn.Module) -> int:
    """Returns the bytes of what adapters that train the model's own tensors have set aside in host memory."""
    return sum(values.nbytes for record in records(model).values() for values in record.base.values())


def no_room_on_host(host_memory: int, least: int) -> InputError:
    """Returns the error of a limit on host memory that is below what every plan takes there."""
    return InputError(
        f"host_memory {format_below(host_memory, least)}: loading the model, and what stays on the host, take "
        f"{format_least(least)}; expected at least that"
    )
