"""Reads the weights of a checkpoint into a plan: each tensor gets its dtype, storage and place as it is read."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_weights
from petl_kernels.ops.quantized import QuantizedTensor, quantize
from petl_kernels.planning.plan import Plan
from petl_kernels.planning.planner import SearchPlan
from petl_kernels.planning.resident import streamed_weights
from petl_kernels.weights.mapped import WeightFile
from petl_kernels.weights.quantized import quantizable, storage_of


def load_planned(
    path_or_id: str | os.PathLike[str],
    model: nn.Module,
    like: nn.Module,
    plan: Plan | SearchPlan | None,
    folder: Path | None,
) -> nn.Module:
    """Gives ``model`` (of ``load_skeleton``) its weights, one tensor after the other; returns it.

    like: the model as it will be trained, on the meta device, with the dtype of each weight. plan: None leaves all
    weights as they are, in memory. folder: on the CPU, for the file that streamed layers are read from: they are
    written into it, and are never in memory together. Beside what stays, one tensor is in memory at a time.
    Raises InputError as ``load_weights`` does, and for streamed layers on the CPU without a folder.
    """
    wanted = dict(like.named_parameters(remove_duplicate=False))
    storages: dict[int, str] = {}
    if plan is not None:
        for owners in quantizable(like):
            storages[id(owners[0].weight)] = storage_of(like, owners, plan.storage, plan.tables)
    file, names = None, []
    if plan is not None and plan.streamed and plan.device == "cpu":
        if folder is None:
            raise InputError("load_planned: the plan streams layers on the CPU; expected a folder for their weights")
        names = streamed_weights(like, plan.streamed)
        file = WeightFile.create(folder / "streamed.safetensors", {name: wanted[name] for name in names})

    def place(name: str, tensor: Tensor) -> Tensor:
        parameter = wanted[name]
        if isinstance(tensor, QuantizedTensor):  # of a checkpoint that was quantized once
            return tensor.to(parameter.dtype, copy=True)
        storage = storages.get(id(parameter), "dense")
        if storage != "dense":
            return quantize(tensor, storage).to(parameter.dtype)
        if file is not None and name in names:
            return file.put(name, tensor)
        return tensor.to(parameter.dtype, copy=True)

    return load_weights(path_or_id, model, place)
