"""Hugging Face checkpoints in: a model and its tokenizer from a folder or a hub id."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from petl_kernels import versions
from petl_kernels.errors import InputError
from petl_kernels.transformers_names import has_own_head

# config.model_type -> class; NLLB is an m2m_100, mBART-50 an mbart, MADLAD-400 a t5
SUPPORTED = {
    "m2m_100": "M2M100ForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "marian": "MarianMTModel",
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.spm", "vocab.json")


def load_pretrained(path_or_id: str | os.PathLike, dtype: torch.dtype = torch.float32):
    """(model, tokenizer) of a checkpoint folder or a hub id; the model is on the CPU, in eval mode, in `dtype`.

    Classes: M2M-100 and NLLB, mBART and mBART-50, Marian, T5, mT5 and MADLAD-400. Layerdrop, which skips whole layers
    at random in training (0.05 in M2M-100's configs), is set to 0: adapters must see the same layers in every step.

    Raises InputError in one line: no such folder, not a checkpoint, a class that is not supported, weights that are
    damaged or do not fit the config, no tokenizer, a tokenizer with more tokens than the model.
    """
    name, folder, config = _checked(path_or_id)
    tokenizer = _load_tokenizer(name, folder)
    model, info = _attempt(
        f"model {name!r}",
        _model_class(config).from_pretrained,
        name,
        config=config,
        dtype=dtype,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"model {name!r}: {len(missing)} tensors are missing from the weights, {missing[0]!r} first")
    _check_vocabulary(name, model, tokenizer)
    return model.eval(), tokenizer


def load_skeleton(path_or_id: str | os.PathLike):
    """(model, tokenizer) as ``load_pretrained``, with parameters on the meta device, in fp32: no weight is read.

    Raises InputError as it does, but for what only the weights can show.
    """
    name, folder, config = _checked(path_or_id)
    tokenizer = _load_tokenizer(name, folder)
    model = skeleton(config, untied=_head_apart(name))
    _load_generation_config(name, model)
    _check_vocabulary(name, model, tokenizer)
    return model, tokenizer


def _load_generation_config(name: str, model: nn.Module) -> None:
    """As ``from_pretrained`` does: words that are never chosen, a forced end."""
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):  # a checkpoint without one: transformers makes it from the model's config
        model.generation_config = GenerationConfig.from_pretrained(name)


def load_weights(path_or_id: str | os.PathLike, model: nn.Module, place: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Give ``model``, a skeleton, the weights of its checkpoint, one tensor after the other; returns it.

    place(name, tensor): what stands in the model in the place of ``tensor``, which is a view into a file: a copy in
    another dtype, say. Beside the finished model at most one tensor is in memory. Raises InputError as
    ``load_pretrained`` does.
    """
    name = os.fspath(path_or_id)
    names = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    made: dict[int, nn.Parameter] = {}
    for key, read in _attempt(f"model {name!r}", _tensors, name):
        if key in names and id(names[key]) not in made:
            tensor = _attempt(f"model {name!r}", read)
            if tensor.shape != names[key].shape:
                raise InputError(
                    f"model {name!r}: {key} has shape {tuple(tensor.shape)}, expected {tuple(names[key].shape)}"
                )
            made[id(names[key])] = nn.Parameter(place(key, tensor), requires_grad=False)
        elif key in buffers:
            buffers[key].copy_(_attempt(f"model {name!r}", read))
    if len(made) < len({id(parameter) for parameter in names.values()}):
        # names that only transformers knows how to map, or tensors that it makes itself: all of it at once, then
        whole = dict(load_pretrained(path_or_id)[0].named_parameters(remove_duplicate=False))
        made = {}
        for key, parameter in names.items():
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(place(key, whole.pop(key).detach()), requires_grad=False)
    for key, parameter in names.items():
        owner, _, attribute = key.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made[id(parameter)])
    return model


def _tensors(name: str) -> list[tuple[str, Callable[[], Tensor]]]:
    """The tensors of a checkpoint's files by name, and how to read each; nothing is read yet."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=[*_WEIGHTS[:2]]))
        if not _has(folder, _WEIGHTS[:1]):
            folder = Path(snapshot_download(name, allow_patterns=[*_WEIGHTS[2:]]))
    found = []
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        opened = safetensors.safe_open(path, framework="pt")
        found += [(key, partial(opened.get_tensor, key)) for key in opened.keys()]  # noqa: SIM118  not a mapping
    for path in sorted(folder.glob("pytorch_model*.bin")) if not files else ():
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        found += [(key, partial(state.__getitem__, key)) for key in list(state)]
    return found


def load_config(path_or_id: str | os.PathLike):
    """The config of a checkpoint folder, a hub id or a config's JSON file alone. Raises InputError."""
    versions.check("transformers")
    import transformers

    path = Path(path_or_id)
    if path.suffix != ".json":
        return _checked(path_or_id, weights=False)[2]
    if not path.is_file():
        raise InputError(f"model {str(path)!r}: no such file")
    config = _attempt(f"config {str(path)!r}", transformers.AutoConfig.from_pretrained, str(path))
    return _supported(str(path), config)


def skeleton(config, untied: bool | None = None):
    """The model of a config on the meta device, in fp32 and in eval mode; its buffers are real.

    untied: whether the output projection has a weight of its own; None is what the config says.
    """
    versions.check("accelerate")
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _model_class(config)(config)
    model.tie_weights()
    if untied is None:
        untied = has_own_head(config)
    if untied and model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
    return model.eval()


def _head_apart(name: str) -> bool:
    """Whether a checkpoint's output projection has other values than its embeddings, as transformers asks, too."""
    tensors = dict(_attempt(f"model {name!r}", _tensors, name))
    embeddings = next((tensors[key] for key in ("shared.weight", "model.shared.weight") if key in tensors), None)
    head = tensors.get("lm_head.weight")
    return None not in (embeddings, head) and not torch.equal(embeddings(), head())


def _checked(path_or_id: str | os.PathLike, weights: bool = True):
    """(name, folder or None, config), of what can be loaded as far as names tell."""
    versions.check("transformers")
    import transformers

    name = os.fspath(path_or_id)
    folder = _folder(name)
    what = f"model {name!r}" if folder is not None else f"model {name!r} is no folder here and as a hub id"
    config = _supported(name, _attempt(what, transformers.AutoConfig.from_pretrained, name))
    if weights and folder is not None and not _has(folder, _WEIGHTS):
        raise InputError(f"model {name!r}: the folder has a config but no weights")
    return name, folder, config


def _supported(name: str, config):
    if config.model_type not in SUPPORTED:
        raise InputError(
            f"model {name!r}: type {config.model_type!r} is not supported, only {', '.join(sorted(SUPPORTED))}"
        )
    no_layerdrop(config)
    return config


def _model_class(config):
    import transformers

    return getattr(transformers, SUPPORTED[config.model_type])


def _check_vocabulary(name: str, model, tokenizer) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(f"model {name!r}: the tokenizer has {len(tokenizer)} tokens, the model only {rows}")


def _folder(name: str) -> Path | None:
    """The local folder, or None for a hub id ("name" or "owner/name")."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model {name!r}: the folder has no config.json, so it is not a checkpoint")
        return path
    if path.exists():
        raise InputError(f"model {name!r} is a file: a checkpoint folder or a hub id was expected")
    beside = path.parent != Path() and path.parent.is_dir()  # "runs/x" where runs/ is a folder here
    if beside or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name.strip("/"):
        raise InputError(f"model {name!r}: no such folder")
    return None


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _load_tokenizer(name: str, folder: Path | None):
    from transformers import AutoTokenizer

    if folder is not None and not _has(folder, _TOKENIZER_FILES):
        raise InputError(f"model {name!r}: the folder has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")  # unused by MarianTokenizer
        return _attempt(f"tokenizer of {name!r}", AutoTokenizer.from_pretrained, name)


def no_layerdrop(config) -> None:
    for key in ("encoder_layerdrop", "decoder_layerdrop", "layerdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)


def _attempt(what: str, load, *args, **kwargs):
    """Call `load`; whatever transformers, the hub or safetensors raise becomes one line."""
    try:
        return load(*args, **kwargs)
    except (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InputError(f"{what} cannot be loaded: {lines[0]}") from error
