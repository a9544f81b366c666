"""The weights of a merged run: their dtype, and their rounding."""

from __future__ import annotations

from pathlib import Path

import torch

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import checkpoint_dtype, is_quantized
from petl_kernels.weights.quantized import quantize_model, storages_of

from ..config import TrainConfig
from ..models.adapt import cast_frozen_matrices
from ..models.precision import product_dtype
from ..runs import RunFolder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merged_dtype(path: str | Path, name: str | None = None) -> torch.dtype:
    """Returns the dtype ``name`` of ``DTYPES``; for None, the dtype of the checkpoint that the run began with."""
    if name is not None:
        return DTYPES[name]
    run = RunFolder(Path(path))
    found = checkpoint_dtype(run.model if run.model.is_dir() else run.read_config().model)
    return found if found in DTYPES.values() else torch.float32


def check_original(config: TrainConfig) -> None:
    """Raises InputError for a run whose checkpoint was quantized once, since the original weights are not there."""
    if not config.is_new and is_quantized(config.model):
        raise InputError(
            f"into original: the run began with {config.model}, a quantized checkpoint; expected --into quantized"
        )


def quantize_as_trained(model, config: TrainConfig, storages: tuple[str, str]) -> None:
    """Rounds the weights of a loaded run to those that its adapter was trained beside.

    storages: of layers and of tables, see ``run_storages``. Raises InputError where both are "dense", unless the
    weights are those of a checkpoint that was quantized once.
    """
    if storages != ("dense", "dense"):
        quantize_model(model, *storages)
    elif storages_of(model) == ("dense", "dense"):
        raise InputError("into quantized: the run was trained beside weights that were not; expected --into original")
    if (dtype := product_dtype(config)) is not None:
        cast_frozen_matrices(model, dtype)
