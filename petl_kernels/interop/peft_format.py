"""Hugging Face PEFT's format: LORA, IA3 and LN_TUNING, written and read.

A folder has `adapter_config.json` and `adapter_model.safetensors`. Keys are "base_model.model." + the module's path in
the Hugging Face model + a suffix of PEFT's. LoRA's scale is alpha / r, or alpha / sqrt(r) with `use_rslora`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.interop.peft_targets import read_targets, short_names, write_targets
from petl_kernels.interop.store import read_json, read_tensors, write_adapter
from petl_kernels.methods.base import Method
from petl_kernels.methods.ia3 import IA3
from petl_kernels.methods.ln_tuning import LayerNormTuning
from petl_kernels.methods.lora import LoRA, largest_rank
from petl_kernels.ops.quantized import QuantizedTensor, quantize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Settings that change what the adapter computes and have no counterpart here. They are refused unless they are off.
_UNSUPPORTED = {
    "LORA": (
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    ),
    "IA3": ("modules_to_save",),
    "LN_TUNING": ("modules_to_save",),
}
# Settings that are read, and those that change nothing of what a trained adapter computes: its start and its origin.
_READ = {
    "LORA": (
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    ),
    "IA3": ("exclude_modules", "feedforward_modules", "target_modules"),
    "LN_TUNING": ("exclude_modules", "target_modules"),
}
_WITHOUT_EFFECT = {
    "": (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    # PEFT itself does without fan_in_fan_out where the layer is PyTorch's own Linear or Embedding, as all are here
    "LORA": (
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
    ),
    "IA3": ("fan_in_fan_out", "init_ia3_weights"),
    "LN_TUNING": (),
}
# Initialisations that leave the base and the formula as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Initialisations after which the base model is not the plain one any more, so that A and B alone mean nothing.
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
# The end of a refusal: what to do with a file of PEFT's that is not read.
_INSTEAD = "PEFT's merge_and_unload() puts such an adapter into the model, and save_pretrained() of that is read"


def can_write(config: Method) -> bool:
    """Returns whether PEFT has a type for the method."""
    return config.peft_type is not None


def write(folder: Path, model: nn.Module, config: Method, state: dict[str, Tensor]) -> None:
    """Writes the adapter's two files into `folder`."""
    kind = str(config.peft_type)
    settings = {"LORA": _lora_settings, "IA3": _ia3_settings, "LN_TUNING": _ln_settings}[kind]
    content = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", "") or None,
        "inference_mode": True,
        "task_type": "SEQ_2_SEQ_LM",
        "peft_type": kind,
        "modules_to_save": None,
        **settings(model, config),
    }
    to_peft = {"LORA": _lora_key, "IA3": str, "LN_TUNING": _ln_key}[kind]
    tensors = {_PREFIX + to_peft(key): tensor for key, tensor in state.items()}
    write_adapter(folder / CONFIG, content, folder / WEIGHTS, tensors)


def read(folder: Path, model: nn.Module) -> tuple[Method, dict[str, Tensor]]:
    """Returns (config, state) of the adapter in `folder`, with the state's keys as `adapter_state` has them.

    Raises InputError for damaged files, PEFT types and settings that are not supported, foreign keys.
    """
    path = folder / CONFIG
    content = read_json(path)
    kind = content.get("peft_type")
    if kind is None:
        raise InputError(f"{path} has no peft_type: not a PEFT adapter")
    readers = {"LORA": _read_lora, "IA3": _read_ia3, "LN_TUNING": _read_ln}
    if not isinstance(kind, str) or kind not in readers:
        raise InputError(f"{path}: peft_type {kind!r} is not supported, only {', '.join(readers)}")
    _check_settings(path, kind, content)
    tensors = _strip_prefix(folder / WEIGHTS, read_tensors(folder / WEIGHTS))
    try:
        return readers[kind](content, _without_base(model, tensors), model)
    except (InputError, TypeError, ValueError, re.error) as error:
        raise InputError(f"{path}: {error}") from error


def _check_settings(path: Path, kind: str, content: dict) -> None:
    known = {*_READ[kind], *_WITHOUT_EFFECT[""], *_WITHOUT_EFFECT[kind]}
    for key in sorted(content.keys() - known):
        if content[key] and key in _UNSUPPORTED[kind]:
            raise InputError(f"{path}: {key} = {content[key]!r} is not supported; {_INSTEAD}")
        if content[key]:  # what is off does nothing
            written = f", written by PEFT {content['peft_version']}" if content.get("peft_version") else ""
            raise InputError(f"{path}: {key} = {content[key]!r} is a setting that {kind} is not known to have{written}")


# -- LORA -----------------------------------------------------------------------------------------------------------


def _lora_settings(model: nn.Module, config: LoRA) -> dict:
    return {
        "r": config.rank,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": write_targets(model, config.targets, config.target_paths(model)),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {key: _whole(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _lora_key(key: str) -> str:
    path, _, suffix = key.rpartition(".")
    if suffix == "bias":
        return f"{path}.base_layer.bias"
    return f"{key}.weight" if suffix in ("lora_A", "lora_B") else key


def _read_lora(content: dict, tensors: dict[str, Tensor], model: nn.Module) -> tuple[LoRA, dict[str, Tensor]]:
    start = content.get("init_lora_weights")
    if start not in _PLAIN_STARTS and not str(start).lower().startswith(_CHANGES_BASE):
        raise InputError(f"init_lora_weights = {start!r} is not supported")
    if start not in _PLAIN_STARTS:
        raise InputError(
            f"init_lora_weights = {start!r} is not supported: it changes the base model; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    if content.get("bias") not in (None, "none", "lora_only"):
        raise InputError(f"bias = {content['bias']!r} is not supported, only 'none' and 'lora_only'; {_INSTEAD}")
    _check_alphas(content)
    if content.get("use_dora") and content.get("lora_dropout"):
        raise InputError(f"lora_dropout = {content['lora_dropout']!r} with use_dora is not supported; {_INSTEAD}")
    config = LoRA(
        rank=content.get("r", 8),
        alpha=_number(content, "lora_alpha", 8),
        dropout=_number(content, "lora_dropout", 0.0),
        targets=read_targets(model, content),
        rank_pattern=_patterns(content, "rank_pattern", int),
        alpha_pattern=_patterns(content, "alpha_pattern", (int, float)),
        rslora=bool(content.get("use_rslora")),
        bias=content.get("bias") or "none",
        dora=bool(content.get("use_dora")),
    )
    _check_ranks(model, config)
    state = {}
    for key, tensor in tensors.items():
        path, _, last = key.rpartition(".")
        if path.endswith((".lora_A", ".lora_B")) and last == "weight":
            state[path] = tensor
        elif path.endswith(".base_layer") and last == "bias":
            state[f"{path.removesuffix('.base_layer')}.bias"] = tensor
        elif last in ("lora_embedding_A", "lora_embedding_B") or (last == "lora_magnitude_vector" and config.dora):
            state[key] = tensor
        else:
            raise InputError(f"{WEIGHTS} holds {_PREFIX + key!r}, which LoRA does not have")
    return config, state


def _check_alphas(content: dict) -> None:
    for key, alphas in (
        ("lora_alpha", [_number(content, "lora_alpha", 8)]),
        ("alpha_pattern", _patterns(content, "alpha_pattern", (int, float)).values()),
    ):
        if not all(alpha > 0 for alpha in alphas):
            raise InputError(f"{key} = {content[key]!r} is not supported, only numbers above 0; {_INSTEAD}")


def _check_ranks(model: nn.Module, config: LoRA) -> None:
    for path in config.target_paths(model):
        target: Any = model.get_submodule(path)
        rank, most = config.rank_of(path), largest_rank(target)
        if rank > most:
            setting = f"r = {rank}" if rank == config.rank else f"rank_pattern = {config.rank_pattern!r}"
            raise InputError(f"{setting} is not supported: rank {rank} of {path!r}, at most {most}; {_INSTEAD}")


def _patterns(content: dict, key: str, kind) -> dict:
    patterns = content.get(key) or {}
    if not isinstance(patterns, dict) or not all(isinstance(value, kind) for value in patterns.values()):
        raise InputError(f"{key} {patterns!r}: expected an object of names and numbers")
    for pattern in patterns:
        re.compile(pattern)
    return patterns


def _number(content: dict, key: str, default: float) -> float:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{key} {value!r}: expected a number")
    return float(value)


# -- base weights ---------------------------------------------------------------------------------------------------


def _without_base(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns ``tensors`` without the weights of the base model that PEFT stores too: the output projection's where it
    is a target, and those of tables that had been resized. Raises InputError where one differs from this model's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rest = {}
    for key, tensor in tensors.items():
        path, _, last = key.rpartition(".")
        name = f"{path.removesuffix('.base_layer')}.{last}"
        if last == "weight" and (path.endswith(".base_layer") or key in parameters):
            _check_same_base(parameters.get(name), name, tensor)
        else:
            rest[key] = tensor
    return rest


def _check_same_base(here: Tensor | None, name: str, tensor: Tensor) -> None:
    if here is None or here.shape != tensor.shape:
        raise InputError(f"{WEIGHTS} brings a base weight {name!r} that this model has not or in another shape")
    here = here.detach().cpu()
    if isinstance(here, QuantizedTensor):
        again = quantize(tensor.to(here.dtype), here.storage)
        same = torch.equal(again.parts()[0], here.parts()[0])  # the packed values
    else:
        same = torch.equal(here.to(tensor.dtype), tensor) or torch.equal(here, tensor.to(here.dtype))
    if not same:
        raise InputError(f"{WEIGHTS} brings a base weight {name!r} that differs from this model's: another base model")


# -- IA3 ------------------------------------------------------------------------------------------------------------


def _ia3_settings(model: nn.Module, config: IA3) -> dict:
    places = config.places(model)
    inputs = [path for path, feedforward in places.items() if feedforward]
    names = short_names(model, places)
    short = sorted({path.rpartition(".")[2] for path in inputs})
    if isinstance(names, str) or _ending(places, short) != inputs or not set(short) <= set(names):
        names, short = sorted(places), inputs  # PEFT expects the feed-forward names among the targets' names
    return {
        "target_modules": names,
        "feedforward_modules": sorted(short),
        "fan_in_fan_out": False,
    }


def _ending(paths: Iterable[str], names: Iterable[str]) -> list[str]:
    """Returns the paths that end with a name, whatever stands before it: PEFT's rule for feed-forward modules."""
    return [path for path in paths if path.endswith(tuple(names))]


def _read_ia3(content: dict, tensors: dict[str, Tensor], model: nn.Module) -> tuple[IA3, dict[str, Tensor]]:
    targets = read_targets(model, content)
    names = content.get("feedforward_modules") or ()
    places = IA3(targets=targets, feedforward=()).places(model)
    if isinstance(names, str):
        inputs = [path for path in places if re.fullmatch(names, path)]
    else:
        inputs = _ending(places, names)
    for key in tensors:
        if not key.endswith(".ia3_l"):
            raise InputError(f"{WEIGHTS} holds {_PREFIX + key!r}, which (IA)^3 does not have")
    return IA3(targets=targets, feedforward=tuple(inputs)), tensors


# -- LN_TUNING ------------------------------------------------------------------------------------------------------


def _ln_settings(model: nn.Module, config: LayerNormTuning) -> dict:
    paths = dict.fromkeys(name.rpartition(".")[0] for name in config.base_tensors(model))
    return {
        "target_modules": write_targets(model, config.targets, list(paths)),
    }


def _ln_key(key: str) -> str:
    path, _, suffix = key.rpartition(".")
    return f"{path}.ln_tuning_layers.{suffix}"


def _read_ln(content: dict, tensors: dict[str, Tensor], model: nn.Module) -> tuple[LayerNormTuning, dict]:
    state = {}
    for key, tensor in tensors.items():
        path, _, last = key.rpartition(".")
        if not path.endswith(".ln_tuning_layers"):
            raise InputError(f"{WEIGHTS} holds {_PREFIX + key!r}, which LayerNorm tuning does not have")
        state[f"{path.removesuffix('.ln_tuning_layers')}.{last}"] = tensor
    return LayerNormTuning(targets=read_targets(model, content)), state


def _strip_prefix(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for key in tensors:
        if not key.startswith(_PREFIX):
            raise InputError(f"{path} holds {key!r}: PEFT's keys start with {_PREFIX!r}")
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def _whole(number: float) -> int | float:
    """Returns 32 for 32.0, since PEFT writes whole alphas as integers."""
    return int(number) if float(number).is_integer() else number
