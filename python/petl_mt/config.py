"""What a training run is told: one dataclass, read from flags, from YAML, or made in Python."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from petl_kernels import versions
from petl_kernels.errors import InputError

OF_A_NEW_MODEL = ("vocab_size", "vocab_text", "character_coverage", "d_model", "layers", "ffn", "heads")
COUNTS = ("steps", "batch_tokens", "accumulate", "max_length", "beam", "d_model", "layers", "vocab_size")
COUNTS += ("ffn", "heads", "eval_every", "patience")
SCHEDULES = ("inverse-sqrt", "linear", "polynomial")
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "adamw8bit")
UNCAPTURED = {  # tiers that no CUDA graph holds, and why
    0: "CUDA graphs take packed rows, which lean layers alone read",
    5: "a CUDA graph holds no inputs in host memory",
}

# Peak learning rates for a model of width 1,024, where full fine-tuning wants 3e-5 (fairseq's mBART recipe). What
# starts at zero beside a frozen base wants 10 to 30 times that, single vectors and prefixes more still. Adam's best
# rate falls with the width, so `default_lr` multiplies by 1024 / d_model.
LEARNING_RATES = {
    "full": 3e-5,
    "cross-attention": 1e-4,
    "adapter": 5e-4,
    "adapter-sublayer": 5e-4,
    "pfeiffer": 5e-4,
    "parallel": 5e-4,
    "lora": 5e-4,
    "bitfit": 1e-3,
    "bitfit-biases": 1e-3,
    "ln": 1e-3,
    "prefix": 1e-3,
    "ia3": 3e-3,
}
NEW_MODEL_LEARNING_RATE = 5e-4  # at width 512, the transformer's usual rate with inverse-sqrt decay


@dataclass(frozen=True)
class Pair:
    """Two files aligned line by line, and their languages."""

    src_lang: str
    tgt_lang: str
    source: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.src_lang}-{self.tgt_lang}"


@dataclass
class TrainConfig:
    """Everything that decides a run. ``None`` means: the default of the method or model, see ``resolve``."""

    model: str = ""  # folder, hub id, or "new"
    out: str = ""
    train: list[Pair] = field(default_factory=list)
    valid: list[Pair] = field(default_factory=list)

    # --model new
    vocab_size: int = 8000
    vocab_text: list[str] = field(default_factory=list)  # further text for the vocabulary only
    character_coverage: float = 0.9999
    d_model: int = 512
    layers: int = 6  # encoder layers, and as many decoder layers
    ffn: int | None = None  # 4 * d_model
    heads: int | None = None  # d_model / 64

    method: str | None = None  # "full" for a new model, "adapter" for any other
    params: str | int | float | None = None  # "10%", "2M", 0.1
    method_args: dict[str, Any] = field(default_factory=dict)

    steps: int = 10_000
    batch_tokens: int = 4096  # padded tokens of the longer side, in one batch
    accumulate: int = 1  # batches to one update
    max_length: int = 256  # tokens; longer pairs are left out, and counted
    memory: str | None = None  # a plan is made for that many bytes, see petl_kernels.plan
    plan: str | None = None  # a plan's file, in place of one that is made
    allow: list[str] = field(default_factory=list)  # approximations that a plan may use
    tier: int | None = None  # how little the layers keep for backward, see petl_kernels.lean; 1, or the plan's choice

    # steps are captured once for each shape of their rows, and replayed; None: on a CUDA device, where that can be
    cuda_graphs: bool | None = None
    optimizer: str = "adamw"  # or adamw8bit: moments rounded to 8 bits, by bitsandbytes
    lr: float | None = None
    schedule: str | None = None  # inverse-sqrt for a new model, linear for any other
    warmup: int | None = None  # steps / 10, at most 4,000
    label_smoothing: float = 0.1
    dropout: float | None = None  # the model's own; 0.1 for a new one
    attention_dropout: float | None = None
    clip: float = 1.0  # 0 switches it off
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    precision: str = "fp32"
    seed: int = 1

    eval_every: int | None = None  # steps / 10
    patience: int | None = None  # evaluations without a better validation loss before stopping
    beam: int = 5
    bleu_tokenize: str | None = None  # sacreBLEU's tokenizer; None chooses by target language
    tensorboard: bool = False

    def __post_init__(self) -> None:
        self.train = [_pair(item, self, "train") for item in self.train]
        self.valid = [_pair(item, self, "valid") for item in self.valid]
        self.betas = tuple(self.betas)

    @property
    def is_new(self) -> bool:
        return self.model == "new"

    def check(self) -> None:
        """Refuse what can be refused without reading a file."""
        _need(bool(self.model), "model: not given; expected a folder, a hub id, or new")
        _need(bool(self.out), "out: not given; expected a folder to write the run to")
        _need(bool(self.train), "train: not given; expected a source file and a target file")
        if not self.is_new:
            pairs = {(p.src_lang, p.tgt_lang) for p in self.train}
            _need(len(pairs) == 1, f"train: {len(pairs)} language pairs; several at once need --model new")
        self.check_settings()
        if self.optimizer == "adamw8bit":
            require_bitsandbytes("optimizer adamw8bit")
        _need(
            not self.tensorboard or importlib.util.find_spec("tensorboard") is not None,
            "tensorboard: not installed; pip install tensorboard, or leave --tensorboard out",
        )
        if "8bit-optimizer" in self.allow:
            require_bitsandbytes("allow 8bit-optimizer")

    def check_settings(self) -> None:
        """Refuse wrong numbers and names, whatever the model and the text are."""
        _need(
            not (self.is_new and self.method not in (None, "full")),
            f"method {self.method!r}: a new model is trained in full, leave --method out",
        )
        self._refuse_without_effect()
        for name in COUNTS:
            check_count(name, getattr(self, name))
        for name in ("label_smoothing", "dropout", "attention_dropout"):
            value = getattr(self, name)
            _need(value is None or 0 <= value < 1, f"{name} {value}: expected at least 0 and below 1")
        _need(self.patience is None or bool(self.valid), "patience: needs validation text (--valid)")
        _need(self.lr is None or (self.lr > 0 and math.isfinite(self.lr)), f"lr {self.lr}: expected above 0")
        _need(self.tier is None or self.tier in range(6), f"tier {self.tier}: expected 0 to 5")
        _need(
            self.tier not in UNCAPTURED or not self.cuda_graphs,
            f"tier {self.tier}: {UNCAPTURED.get(self.tier)}; expected 1 to 4, or no --cuda-graphs",
        )
        _need(self.plan is None or self.memory is not None, "plan: needs the budget that it was made for (--memory)")
        _need(0 <= self.seed < 2**63, f"seed {self.seed}: expected 0 to 2^63 - 1")
        _need(0 <= self.clip < math.inf, f"clip {self.clip}: expected 0 (off) or above")
        _need(0 <= self.weight_decay < math.inf, f"weight_decay {self.weight_decay}: expected 0 or above")
        _need(self.warmup is None or self.warmup >= 0, f"warmup {self.warmup}: expected 0 or above")
        check_count("warmup", self.warmup or None)
        _need(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"betas {self.betas}: expected two numbers, each at least 0 and below 1",
        )
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, (None, *SCHEDULES))
        _choice("precision", self.precision, PRECISIONS)
        _need(
            self.batch_tokens >= self.max_length,
            f"batch_tokens {self.batch_tokens}: expected at least max_length ({self.max_length}), "
            "or the longest sentences fit in no batch",
        )
        if self.params is not None:
            from petl_kernels.methods import parse_budget

            parse_budget(self.params)
        if self.memory is not None:
            from petl_kernels.units import parse_size

            parse_size(self.memory)
        if self.allow:
            from petl_kernels.planning.plan import check_allow

            self.allow = list(check_allow(self.allow))

    def _refuse_without_effect(self) -> None:
        """Options that nothing would look at."""
        defaults = TrainConfig()
        for name in OF_A_NEW_MODEL if self.model and not self.is_new else ():
            _need(
                getattr(self, name) == getattr(defaults, name),
                f"{name} {getattr(self, name)!r}: no effect on a model that exists; expected it with --model new only",
            )
        _need(not self.allow or self.memory is not None, "allow: no effect without a budget; expected --memory with it")
        _need(self.tier is None or self.plan is None, f"tier {self.tier}: no effect, since the plan has its own tiers")
        full = self.method == "full" or (self.is_new and self.method is None)
        _need(not full or self.params is None, f"params {self.params}: no effect, since all of the model is trained")

    def resolve(self, d_model: int) -> TrainConfig:
        """The same configuration with every default of the method and of the model's width filled in."""
        new = dataclasses.replace(self)
        new.method = self.method or ("full" if self.is_new else "adapter")
        new.lr = self.lr if self.lr is not None else default_lr(new.method, d_model, self.is_new)
        new.schedule = self.schedule or ("inverse-sqrt" if self.is_new else "linear")
        new.warmup = self.warmup if self.warmup is not None else min(4000, self.steps // 10)
        new.eval_every = self.eval_every or max(1, self.steps // 10)
        return new

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["betas"] = list(self.betas)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> TrainConfig:
        """A configuration from a mapping; keys that are not fields are refused, with the nearest names."""
        return cls(**check_keys(values, where))


def check_count(name: str, value: int | None) -> None:
    """Raise InputError unless ``value`` is at least 1 and at most 2^31 - 1, or None."""
    _need(value is None or value >= 1, f"{name} {value}: expected at least 1")
    _need(value is None or value < 2**31, f"{name} {value}: expected at most 2^31 - 1")


def require_bitsandbytes(what: str) -> None:
    installed = importlib.util.find_spec("bitsandbytes") is not None
    _need(installed, f"{what}: bitsandbytes is not installed; expected it (pip install 'petl-kernels[8bit]')")
    versions.check("bitsandbytes")


def default_lr(method: str, d_model: int, is_new: bool) -> float:
    if is_new:
        return float(f"{NEW_MODEL_LEARNING_RATE * (512 / d_model) ** 0.5:.3g}")
    return float(f"{LEARNING_RATES.get(method, 5e-4) * 1024 / d_model:.3g}")


_EXTRA_KEYS = ("src_lang", "tgt_lang")


def check_keys(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` as keyword arguments of ``TrainConfig``: names and types checked, pairs made from short forms."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping of option names to values, found {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in _EXTRA_KEYS:
            continue
        if name not in fields:
            near = difflib.get_close_matches(name, [*fields, *_EXTRA_KEYS], n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(fields)}"
            raise InputError(f"{where}: unknown option {key!r}{hint}")
        result[name] = _typed(name, str(fields[name].type), value, where)
    if len(result) + sum(str(key).replace("-", "_") in _EXTRA_KEYS for key in values) < len(values):
        twice = next(key for key in values if "-" in str(key) and str(key).replace("-", "_") in values)
        raise InputError(f"{where}: {twice} and {twice.replace('-', '_')}: one option, given twice")
    languages = [values.get(key, values.get(key.replace("_", "-"))) for key in _EXTRA_KEYS]
    short = [name for name in ("train", "valid") if _is_short(result.get(name, ()))]
    for key, language in zip(_EXTRA_KEYS, languages, strict=True):
        _code(key, language, where)
        if language is not None and not short and (result.get("train") or result.get("valid")):
            raise InputError(f"{where}: {key} {language!r}: no effect, since every pair names its own languages")
    for name in ("train", "valid"):
        if name in result:
            result[name] = _pairs(result[name], languages, name, where)
    return result


class _Loader(yaml.SafeLoader):
    """YAML as it is meant here: no key twice, and a language's code as it is written (no is Norwegian)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(name)
            if name in _EXTRA_KEYS and isinstance(value, yaml.ScalarNode) and value.tag != "tag:yaml.org,2002:null":
                value.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def parse_yaml(text: Any) -> Any:
    """What a YAML text or an open file holds; a key that stands twice is a YAMLError."""
    return yaml.load(text, _Loader)


def each_once(name: str, settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """KEY=VALUE settings as a mapping. Raises InputError for a key that is given twice; ``name`` is the option's."""
    result: dict[str, Any] = {}
    for key, value in settings:
        _need(key not in result, f"{name} {key}: given twice; expected it once")
        result[key] = value
    return result


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        with open(path, encoding="utf-8") as stream:
            values = parse_yaml(stream)
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"config {path}: expected a mapping of option names to values")
    return values


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _choice(name: str, value: Any, choices: tuple) -> None:
    shown = ", ".join(str(c) for c in choices if c is not None)
    _need(value in choices, f"{name} {value!r}: expected one of {shown}")


def _typed(name: str, annotation: str, value: Any, where: str) -> Any:
    """``value`` as the field's type: YAML has 3e-4 as a string, and 1 for 1.0."""
    if value is None and "None" in annotation:
        return None
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    for part in (p.strip() for p in annotation.split("|")):
        kind = kinds.get(part)
        if kind is None or (isinstance(value, bool) and kind is not bool):
            continue
        if isinstance(value, kind):
            return value
        if kind is float and isinstance(value, (int, str)):
            try:
                return float(value)
            except ValueError:
                continue
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
    if annotation.startswith(("list", "dict", "tuple")):
        wanted = {"l": list, "d": dict, "t": (list, tuple)}[annotation[0]]
        if isinstance(value, wanted) and _holds(annotation, value):
            return value
    raise InputError(f"{where}: {name} {value!r}: expected {annotation.replace(' | None', '')}")


def _holds(annotation: str, values: Any) -> bool:
    """Whether a list or mapping of the field's type has what that type says."""
    if annotation.startswith("list[str]"):
        return all(isinstance(value, str) for value in values)
    if annotation.startswith("tuple[float"):
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return not annotation.startswith("dict[str") or all(isinstance(key, str) for key in values)


def _pairs(items: list, languages: list[str | None], name: str, where: str) -> list[Pair]:
    """``[SRC, TGT]`` with the languages beside it, or a list of mappings or pairs."""
    if _is_short(items):
        if None in languages:
            raise InputError(f"{where}: {name} is given as two files; src_lang and tgt_lang are needed with it")
        return [Pair(str(languages[0]), str(languages[1]), *items)]
    keys = {f.name for f in dataclasses.fields(Pair)}
    for item in items:
        if not isinstance(item, Pair) and not (isinstance(item, Mapping) and set(item) == keys):
            raise InputError(
                f"{where}: {name}: expected two files, or a list of mappings with src_lang, tgt_lang, "
                f"source and target; found {item!r}"
            )
        for key in _EXTRA_KEYS if isinstance(item, Mapping) else ():
            _code(f"{name}: {key}", item[key], where)
    return [item if isinstance(item, Pair) else Pair(**{k: str(v) for k, v in item.items()}) for item in items]


def _is_short(items) -> bool:
    """Whether a pair is given as two files, with its languages elsewhere."""
    return len(items) == 2 and all(isinstance(item, str) for item in items)


def _code(name: str, value: Any, where: str) -> None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {name} {value!r}: expected a language's code, in quotes ('no' for Norwegian)")


def _pair(item: Any, config: TrainConfig, name: str) -> Pair:
    return item if isinstance(item, Pair) else Pair(**item)
