"""Hugging Face checkpoints in: a model and its tokenizer from a folder or a hub id."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from petl_kernels import versions
from petl_kernels.errors import InputError
from petl_kernels.methods.owner import own, owner
from petl_kernels.models.structure import set_parameter
from petl_kernels.models.transformers_names import has_own_head, kept_in_fp32, language_ids, sides, target_ids
from petl_kernels.ops.quantized import QuantizedTensor, parts_of, quantize
from petl_kernels.weights.quantized_file import FILE as QUANTIZED_FILE
from petl_kernels.weights.quantized_file import MARKER, VERSION, Stored, stored_tensors

# config.model_type -> class; NLLB is an m2m_100, mBART-50 an mbart, MADLAD-400 and ByT5 a t5, Aya-101 an mt5
SUPPORTED = {
    "m2m_100": "M2M100ForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "marian": "MarianMTModel",
    "nllb-moe": "NllbMoeForConditionalGeneration",
    "seamless_m4t": "SeamlessM4TForTextToText",
    "seamless_m4t_v2": "SeamlessM4Tv2ForTextToText",
    "t5": "T5ForConditionalGeneration",
    "t5gemma": "T5GemmaForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# Files that transformers looks for, in this order: the first that is there is the checkpoint, alone.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MAPPED_ALONE = 2**20  # bytes from which a tensor of a pickled file is mapped by itself
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.spm", "vocab.json")


def load_pretrained(path_or_id: str | os.PathLike, dtype: torch.dtype = torch.float32):
    """Returns (model, tokenizer) of a checkpoint folder or a hub id; the model is on the CPU, in eval mode, in `dtype`.

    Classes: M2M-100 and NLLB, mBART and mBART-50, Marian, T5, ByT5, mT5, Aya-101, UMT5, MADLAD-400, NLLB-MoE,
    SeamlessM4T's text to text and T5Gemma. Layerdrop, which skips whole layers at random in training (0.05 in
    M2M-100's configs), is set to 0: adapters must see the same layers in every step.

    Raises InputError in one line: no such folder, not a checkpoint, a class that is not supported, weights that are
    quantized, damaged or do not fit the config, no tokenizer, a tokenizer with more tokens than the model.
    """
    if is_quantized(path_or_id):
        model, tokenizer = load_skeleton(path_or_id)
        load_weights(path_or_id, model, lambda name, tensor: tensor.to(_dtype_of(model, name, dtype), copy=True))
        return _as_loaded(model, dtype), tokenizer
    name, folder, config = _checked(path_or_id)
    tokenizer = _load_tokenizer(name, folder)
    model = _from_pretrained(name, config, name, dtype=dtype)
    _check_vocabulary(name, model, tokenizer)
    return model.eval(), tokenizer


def is_quantized(path_or_id: str | os.PathLike) -> bool:
    """Returns whether this is the folder of a checkpoint that ``quantize_checkpoint`` has written."""
    return Path(path_or_id, QUANTIZED_FILE).is_file()


def _dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the parameter ``name`` in a model that transformers loads in ``dtype``."""
    return torch.float32 if dtype == torch.float16 and kept_in_fp32(model, name) else dtype


def _as_loaded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Lets parameters of a filled skeleton require grad, and casts saved buffers, as transformers' loader does.

    Quantized weights stay frozen. Returns the model.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(not isinstance(parameter, QuantizedTensor))
    for key in model.state_dict(keep_vars=True).keys() & dict(model.named_buffers()).keys():
        buffer = model.get_buffer(key)
        if buffer.is_floating_point():
            holder, _, name = key.rpartition(".")
            model.get_submodule(holder)._buffers[name] = buffer.to(dtype)
    return model


def load_skeleton(path_or_id: str | os.PathLike):
    """Returns (model, tokenizer) as ``load_pretrained``, with parameters on the meta device, in fp32.

    Of the weights, names and shapes are read, and the values of tables that may be tied or not. ``model.petl.sources``
    has where each parameter and buffer comes from: the name of a tensor in the files, or the tensor itself where
    transformers makes it. Raises InputError as ``load_pretrained`` does.
    """
    name, folder, config = _checked(path_or_id)
    tokenizer = _load_tokenizer(name, folder)
    model = _laid_out(name, config)
    _load_generation_config(name, model)
    _check_vocabulary(name, model, tokenizer)
    return model.eval(), tokenizer


def _load_generation_config(name: str, model: Any) -> None:
    """Sets what ``from_pretrained`` sets for a folder, such as words that are never chosen and a forced end."""
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):  # a checkpoint without one: transformers makes it from the model's config
        model.generation_config = GenerationConfig.from_pretrained(name)


def load_weights(
    path_or_id: str | os.PathLike[str], model: nn.Module, place: Callable[[str, Tensor], Tensor]
) -> nn.Module:
    """Gives ``model``, a skeleton, the weights of its checkpoint, one tensor after the other; returns it.

    place(name, tensor): what stands in the model in the place of ``tensor``, which is a view into a file: a copy in
    another dtype, say. Beside the finished model at most one tensor is in memory. Raises InputError as
    ``load_pretrained`` does.
    """
    name = os.fspath(path_or_id)
    tensors = _attempt(f"model {name!r}", _tensors, name, model.config)

    sources = owner(model).sources or owner(_laid_out(name, model.config)).sources
    assert sources is not None

    def read(key: str) -> Tensor:
        source = sources[key]
        return source if isinstance(source, Tensor) else _attempt(f"model {name!r}", tensors[source].read)

    made: dict[nn.Parameter, tuple[str, nn.Parameter]] = {}
    for key, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            made[parameter] = key, nn.Parameter(place(key, read(key)), requires_grad=False)
        first, weight = made[parameter]
        if sources[first] is not sources[key] and sources[first] != sources[key]:
            raise InputError(f"model {name!r}: {first} and {key} are tied in the model, and differ in the weights")
        set_parameter(model, key, weight)
    for key, buffer in model.named_buffers():
        if key in sources:
            buffer.copy_(read(key))
    return model


def checkpoint_dtype(path_or_id: str | os.PathLike) -> torch.dtype:
    """Returns the floating-point type that most bytes of a checkpoint's weights are in. Raises InputError."""
    name, _, config = _checked(path_or_id)
    sizes: dict[torch.dtype, int] = {}
    for tensor in _attempt(f"model {name!r}", _tensors, name, config).values():
        if tensor.dtype is not None and tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.shape.numel() * tensor.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def checkpoint_dtypes(path_or_id: str | os.PathLike) -> dict[str, torch.dtype | None]:
    """Returns the dtype of each tensor in a checkpoint's files. Raises InputError."""
    name, _, config = _checked(path_or_id)
    return {key: tensor.dtype for key, tensor in _attempt(f"model {name!r}", _tensors, name, config).items()}


def _from_pretrained(name: str, config, files: str | None, **options) -> nn.Module:
    """Runs transformers' own loader, on ``files`` or on the state dict among the options.

    Raises InputError for tensors that are missing, or of another shape than the config's."""
    model, info = _attempt(
        f"model {name!r}",
        _model_class(config).from_pretrained,
        files,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # named below
        **options,
    )
    for key, found, expected in sorted(info["mismatched_keys"])[:1]:
        raise InputError(f"model {name!r}: {key} has shape {tuple(found)}, expected {tuple(expected)} by its config")
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"model {name!r}: {len(missing)} tensors are missing from the weights, {missing[0]!r} first")
    return model


# A number for a tensor of the files is subtracted from this: no weight that a model starts with is as low, and 24 bits
# of fp32's mantissa hold it exactly.
_MARK = -(2.0**22)


def _laid_out(name: str, config) -> nn.Module:
    """Returns the model on the meta device, with ``model.petl.sources``.

    Which tensor of the files goes where, and what is tied to what, is the decision of transformers' own loader: it
    gets tensors of the files' shapes that take no memory, and hold in the place of values which tensor they stand for.
    """
    tensors = _attempt(f"model {name!r}", _tensors, name, config)
    marks = _attempt(f"model {name!r}", _marks, tensors, config)
    shaped = {key: torch.full((), mark).expand(tensors[key].shape) for key, mark in marks.items()}
    model: Any = _from_pretrained(name, config, None, dtype=torch.float32, state_dict=shaped)
    model.config.name_or_path = name
    named = {mark: key for key, mark in marks.items()}

    def source(key: str, tensor: Tensor) -> str | Tensor:
        mark = tensor.detach().flatten()[:1].sum().item()
        if tensor.untyped_storage().nbytes() == tensor.element_size() and mark in named:
            return named[mark]
        if tensor.numel() and tensor.detach().min().item() <= _MARK:
            raise InputError(
                f"model {name!r}: transformers makes {key} of other tensors; expected it as it is in the file"
            )
        return tensor.detach()  # which transformers makes, such as Marian's positions

    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = model.state_dict(keep_vars=True).keys() & dict(model.named_buffers()).keys()
    sources = own(model).sources = {key: source(key, tensor) for key, tensor in parameters.items()}
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for key, parameter in parameters.items():
        if parameter not in empty:
            empty[parameter] = _without_values(parameter, sources[key], tensors)
        set_parameter(model, key, empty[parameter])
    for key in buffers:
        owner, _, attribute = key.rpartition(".")
        found = model.get_buffer(key)
        sources[key] = source(key, found)
        model.get_submodule(owner)._buffers[attribute] = torch.zeros(found.shape)
    return model


def _without_values(parameter: nn.Parameter, source: str | Tensor, tensors: dict[str, Stored]) -> nn.Parameter:
    """Returns a parameter of that shape on the meta device, quantized where its source is."""
    weight = torch.empty(parameter.shape, device="meta")
    storage = tensors[source].storage if isinstance(source, str) else "dense"
    if storage == "dense":
        return nn.Parameter(weight, parameter.requires_grad)
    return nn.Parameter(quantize(weight, storage), requires_grad=False)


def _marks(tensors: dict[str, Stored], config) -> dict[str, float]:
    """Returns a number for each tensor, the same for tables of words with equal values, which transformers compares."""
    rows = {config.vocab_size, getattr(config, "decoder_vocab_size", None)}
    rows |= {own.vocab_size for own in sides(config) or ()}
    marks: dict[str, float] = {}
    tables: list[str] = []
    for i, (key, tensor) in enumerate(tensors.items()):
        marks[key] = _MARK - i
        if len(tensor.shape) == 2 and tensor.shape[0] in rows:
            alike = (other for other in tables if tensors[other].shape == tensor.shape)
            same = (other for other in alike if _same(tensors[other].read(), tensor.read()))
            marks[key] = marks[next(same, key)]
            tables.append(key)
    return marks


def _same(one: Tensor, other: Tensor) -> bool:
    """Returns whether they hold the same values in fp32, compared some rows at a time, or the same quantized parts."""
    if isinstance(one, QuantizedTensor) or isinstance(other, QuantizedTensor):
        parts = parts_of(one), parts_of(other)
        return len(parts[0]) == len(parts[1]) and all(map(torch.equal, *parts))
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.dtype == other.dtype:
        return True
    return all(torch.equal(a.float(), b.float()) for a, b in zip(one.split(4096), other.split(4096), strict=True))


def _tensors(name: str, config) -> dict[str, Stored]:
    """Returns the tensors of a checkpoint's files by name; nothing is read yet."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=[*_WEIGHTS[:2]]))
        if not _has(folder, _WEIGHT_FILES[:2]):
            folder = Path(snapshot_download(name, allow_patterns=[*_WEIGHTS[2:]]))
    found: dict[str, Stored] = {}
    for path in _weight_files(folder, config):
        if path.suffix == ".safetensors":
            found |= stored_tensors(path)
        else:
            found |= _pickled_tensors(path)
    return found


def _pickled_tensors(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a pickled checkpoint, mapped; files of PyTorch 1.5 and older are in memory as a whole.

    A large one is mapped again for each read, so that its pages are given back with it.
    """
    mapped = is_zipfile(path)
    state = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)

    def read(key: str) -> Tensor:
        if mapped and state[key].nbytes >= _MAPPED_ALONE:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)[key]
        return state[key]

    tensors = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    return {key: Stored(tensor.shape, tensor.dtype, partial(read, key)) for key, tensor in tensors.items()}


def _weight_files(folder: Path, config) -> list[Path]:
    """Returns the files that transformers reads, all that an index names."""
    own = getattr(config, "transformers_weights", None)
    names = [own] if own else (*_WEIGHT_FILES, QUANTIZED_FILE)
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None:
        raise FileNotFoundError(f"none of {', '.join([own] if own else _WEIGHT_FILES)} is there")
    if first.suffix != ".json":
        return [first]
    return [folder / name for name in sorted(set(json.loads(first.read_text())["weight_map"].values()))]


def load_config(path_or_id: str | os.PathLike):
    """Returns the config of a checkpoint folder, a hub id or a config's JSON file alone. Raises InputError."""
    versions.check("transformers")
    import transformers

    path = Path(path_or_id)
    if path.suffix != ".json":
        return _checked(path_or_id, weights=False)[2]
    if not path.is_file():
        raise InputError(f"model {str(path)!r}: no such file")
    config = _attempt(f"config {str(path)!r}", transformers.AutoConfig.from_pretrained, str(path))
    if getattr(config, MARKER, None) is not None:
        raise InputError(f"config {str(path)!r}: of a quantized checkpoint; expected its folder")
    return _supported(str(path), config)


def skeleton(config):
    """Returns the model of a config on the meta device, in fp32 and in eval mode; its buffers are real.

    Its output projection has a weight of its own where the config has one; ``load_skeleton`` sees the weights.
    """
    versions.check("accelerate")
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _model_class(config)(config)
    model.tie_weights()
    if has_own_head(config) and model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
    return model.eval()


def load_outline(path_or_id: str | os.PathLike) -> nn.Module:
    """Returns the model that a plan is made from, on the meta device, in fp32 and in eval mode, without a tokenizer.

    What is tied to what is as the weights in a folder have it, as in ``load_skeleton``; where they are not all there,
    for a hub id or a config's JSON file, as the config has it. Raises InputError as ``load_skeleton`` does.
    """
    config, folder = load_config(path_or_id), Path(path_or_id)
    if _has(folder, (*_WEIGHT_FILES, QUANTIZED_FILE)) and all(path.is_file() for path in _weight_files(folder, config)):
        return _laid_out(os.fspath(path_or_id), config).eval()
    return skeleton(config)


def _checked(path_or_id: str | os.PathLike, weights: bool = True):
    """Returns (name, folder or None, config) of what can be loaded as far as names tell."""
    versions.check("transformers")
    import transformers

    name = os.fspath(path_or_id)
    folder = _folder(name)
    what = f"model {name!r}" if folder is not None else f"model {name!r} is no folder here and as a hub id"
    config = _supported(name, _attempt(what, transformers.AutoConfig.from_pretrained, name))
    _check_marker(name, folder, config)
    if weights and folder is not None and not _has(folder, _WEIGHTS):
        raise InputError(f"model {name!r}: the folder has a config but no weights")
    return name, folder, config


def _check_marker(name: str, folder: Path | None, config: Any) -> None:
    """Takes the marker of a quantized checkpoint out of ``config``, which may be saved beside dense weights later.

    Raises InputError for a marker of another version, or where it and the file of such weights are not both there.
    """
    marker = vars(config).pop(MARKER, None)
    here = folder is not None and (folder / QUANTIZED_FILE).is_file()
    if marker is None and here:
        raise InputError(f"model {name!r}: has {QUANTIZED_FILE}, and a config that does not name it; quantize it anew")
    if marker is not None and not here:
        raise InputError(
            f"model {name!r}: its config is of a quantized checkpoint; expected a folder with {QUANTIZED_FILE}"
        )
    if marker is not None and marker.get("version") != VERSION:
        raise InputError(f"model {name!r}: quantized in version {marker.get('version')}; expected version {VERSION}")


def _supported(name: str, config):
    if config.model_type not in SUPPORTED:
        raise InputError(
            f"model {name!r}: type {config.model_type!r} is not supported, only {', '.join(sorted(SUPPORTED))}"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:  # dict, or an object of transformers
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise InputError(
            f"model {name!r}: its config has a quantization_config ({getattr(method, 'value', method)}); expected a "
            "checkpoint of plain weights (--allow quantized rounds them where memory needs it)"
        )
    no_layerdrop(config)
    return config


def _model_class(config):
    import transformers

    return getattr(transformers, SUPPORTED[config.model_type])


def _check_vocabulary(name: str, model, tokenizer) -> None:
    """Raises InputError for a tokenizer with an id, of a word or a language, that has no row in the model's tables."""
    known = {**tokenizer.get_vocab(), **(language_ids(tokenizer) or {})}
    rows = model.get_input_embeddings().num_embeddings
    if max(known.values()) >= rows:
        count, last = max(len(tokenizer), 1 + max(known.values())), max(known, key=lambda word: known[word])
        raise InputError(f"model {name!r}: the tokenizer has {count} tokens, {last!r} the last, the model only {rows}")
    targets, rows = target_ids(tokenizer), model.get_output_embeddings().weight.shape[0]
    if targets is not None and max(targets.values()) >= rows:
        count = 1 + max(targets.values())
        raise InputError(f"model {name!r}: the tokenizer has {count} tokens of the target, the model only {rows}")


def _folder(name: str) -> Path | None:
    """Returns the local folder, or None for a hub id ("name" or "owner/name")."""
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

    if folder is not None and not _has(folder, _TOKENIZER_FILES) and not _is_of_bytes(folder):
        raise InputError(f"model {name!r}: the folder has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")  # unused by MarianTokenizer
        return _attempt(f"tokenizer of {name!r}", AutoTokenizer.from_pretrained, name)


def _is_of_bytes(folder: Path) -> bool:
    """Returns whether the folder's tokenizer is ByT5's, which has no vocabulary in a file."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    settings = _attempt(f"tokenizer of {str(folder)!r}", json.loads, path.read_text(encoding="utf-8"))
    return isinstance(settings, dict) and settings.get("tokenizer_class") == "ByT5Tokenizer"


def positions(config) -> int | None:
    """Returns how many tokens a side of a model can have; None where its table of positions grows, or it has none.

    M2M-100 and NLLB make more positions as they are needed; T5's family counts distances.
    """
    return config.max_position_embeddings if config.model_type in ("mbart", "marian") else None


def no_layerdrop(config: Any) -> None:
    for key in ("encoder_layerdrop", "decoder_layerdrop", "layerdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)


def _attempt(what: str, load, *args, **kwargs):
    """Calls `load`; whatever transformers, the hub or safetensors raise becomes one line."""
    try:
        return load(*args, **kwargs)
    except (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InputError(f"{what} cannot be loaded: {lines[0]}") from error
