"""The configuration of a training run: one dataclass, read from flags, from YAML, or made in Python.

A field of ``TrainConfig`` has its default, its help with the unit, and its name for a value in one place; the flags of
``petl-mt``, their help and the keys of a YAML file follow from the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from petl_kernels import versions
from petl_kernels.errors import InputError
from petl_kernels.units import parse_size

from .config_file import LANGUAGE_KEYS, typed

OF_A_NEW_MODEL = ("vocab_size", "vocab_text", "character_coverage", "d_model", "layers", "ffn", "heads")
COUNTS = ("steps", "batch_tokens", "accumulate", "max_length", "beam", "d_model", "layers", "vocab_size")
COUNTS += ("ffn", "heads", "eval_every", "patience")
SCHEDULES = ("inverse-sqrt", "linear", "polynomial")
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit")
APPROXIMATIONS = "quantized (frozen weights in 8 or 4 bits), 8bit-optimizer, bf16-gradients"
UNCAPTURED: dict[int | None, str] = {  # tiers that no CUDA graph holds, and why
    0: "CUDA graphs take packed rows, which lean layers alone read",
    5: "a CUDA graph holds no inputs in host memory",
}

NEW_MODEL_LEARNING_RATE = 5e-4  # at width 512, the transformer's usual rate with inverse-sqrt decay


def option(
    default: Any, help: str, metavar: str | tuple[str, ...] = "", otherwise: str = "", joined: bool = False
) -> Any:
    """Returns a field of ``TrainConfig`` with its texts as metadata: "help", "metavar", "default" and "joined".

    help: the meaning and the unit; {methods} stands for the names of all methods. metavar: the name of the value in
    ``--help``. otherwise: the default in words, where the value alone does not tell it. joined: the flag takes a list
    as one word, with commas. A list, dict or other callable default is called for each configuration.
    """
    metadata = {"help": help, "metavar": metavar, "default": otherwise, "joined": joined}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Pair:
    """Two files that are aligned line by line, and their languages."""

    src_lang: str
    tgt_lang: str
    source: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.src_lang}-{self.tgt_lang}"


@dataclass
class TrainConfig:
    """Everything that decides a run. ``None`` stands for the default of the method or of the model, see ``resolve``."""

    model: str = option("", "checkpoint folder, hub id, or new: train from scratch", "DIR|ID|new")
    out: str = option("", "folder for the run, made if it is not there", "DIR")
    train: list[Pair] = option(list, "two text files to train on, a sentence a line, aligned; gzip too", ("SRC", "TGT"))
    valid: list[Pair] = option(
        list, "two text files that choose the best checkpoint and are scored", ("SRC", "TGT"), otherwise="none"
    )

    # --model new
    vocab_size: int = option(8000, "pieces of the vocabulary that is learnt from the text")
    vocab_text: list[str] = option(list, "more text, for the vocabulary only", "FILE", otherwise="none")
    character_coverage: float = option(0.9999, "share of the text's characters in the vocabulary", "SHARE")
    d_model: int = option(512, "width: values a token")
    layers: int = option(6, "encoder layers, and as many decoder layers")
    ffn: int | None = option(None, "hidden units of a feed-forward block", otherwise="4 times --d-model")
    heads: int | None = option(None, "attention heads", otherwise="--d-model / 64")

    method: str | None = option(
        None,
        "what is trained: {methods}; see petl-mt methods",
        "NAME",
        otherwise="adapter; full for a new model",
    )
    params: str | int | float | None = option(
        None,
        "size of the method in trained parameters: 10% of the model's, or 2M",
        "BUDGET",
        otherwise="the method's own size",
    )
    method_args: dict[str, Any] = option(
        dict, "settings of the method, such as {rank: 16}; `petl-mt methods` has them", otherwise="none"
    )

    steps: int = option(10_000, "updates of the parameters")
    batch_tokens: int = option(4096, "tokens of a batch, padding included, on its longer side")
    accumulate: int = option(1, "batches to one update")
    max_length: int = option(256, "longest sentence, in tokens; longer pairs are left out, and counted")
    memory: str | None = option(
        None,
        "bytes that all of it may take, such as 8GiB; docs/TROUBLESHOOTING.md says what counts",
        "SIZE",
        otherwise="no limit",
    )
    host_memory: str | None = option(
        None,
        "host memory that a plan may count beside a CUDA device, for weights and text; nothing enforces it, and "
        "Python's own comes on top; on a CPU --memory is host memory",
        "SIZE",
        otherwise="what is free",
    )
    plan: str | None = option(None, "a plan of petl-mt plan --json", "FILE", otherwise="one is made now")
    allow: list[str] = option(
        list, f"what a plan may round: {APPROXIMATIONS}", "NAMES", otherwise="nothing", joined=True
    )
    tier: int | None = option(
        None,
        "how little layers keep for the backward pass: 1 to 5, 0 for the model's own layers",
        otherwise="1, or the choice of the plan",
    )
    cuda_graphs: bool | None = option(
        None,
        "capture steps once for each shape of their rows, and replay them",
        otherwise="on a CUDA device, where that can be",
    )
    optimizer: str = option("adamw", "adamw8bit keeps 2 bytes a parameter in the place of 8", "adamw|adamw8bit")
    lr: float | None = option(None, "highest learning rate", otherwise="by method and width")
    schedule: str | None = option(
        None,
        "how the rate falls: inverse-sqrt, linear or polynomial",
        "NAME",
        otherwise="linear; inverse-sqrt for a new model",
    )
    warmup: int | None = option(
        None, "updates during which the rate rises", otherwise="a tenth of --steps, 4000 at most"
    )
    label_smoothing: float = option(0.1, "share of the target that is spread over all words")
    dropout: float | None = option(
        None, "share of values that are dropped", otherwise="the model's own; 0.1 for a new one"
    )
    attention_dropout: float | None = option(
        None, "share of attention weights that are dropped", otherwise="the model's own"
    )
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    weight_decay: float = option(0.0, "AdamW's decay of matrices, a unit of learning rate")
    betas: tuple[float, float] = option((0.9, 0.98), "AdamW's decay of its two moments", ("B1", "B2"))
    precision: str | None = option(
        None,
        "dtype of matrix products and frozen matrices",
        "fp32|bf16|fp16",
        otherwise="fp32; fp16 on a CUDA card without bf16",
    )
    seed: int = option(1, "seed of order, dropout and what starts at random")

    eval_every: int | None = option(
        None, "updates between two evaluations, which also save", otherwise="a tenth of --steps"
    )
    patience: int | None = option(
        None, "evaluations without a better validation loss that end the run", otherwise="no end before --steps"
    )
    beam: int = option(5, "beams of the search")
    bleu_tokenize: str | None = option(
        None, "sacreBLEU's tokenizer", "NAME", otherwise="by target language; 13a for most"
    )
    tensorboard: bool = option(False, "write metrics for TensorBoard, too", otherwise="off")

    def __post_init__(self) -> None:
        self.train, self.valid = (
            [item if isinstance(item, Pair) else Pair(**item) for item in pairs] for pairs in (self.train, self.valid)
        )
        self.betas = cast("tuple[float, float]", tuple(self.betas))  # ``check_settings`` counts them

    @property
    def is_new(self) -> bool:
        return self.model == "new"

    def check(self) -> None:
        """Raises InputError for what is wrong whatever the files hold."""
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
        """Raises InputError for wrong numbers and names, whatever the model and the text are."""
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
        _choice("precision", self.precision, (None, *PRECISIONS))
        _need(
            self.batch_tokens >= self.max_length,
            f"batch_tokens {self.batch_tokens}: expected at least max_length ({self.max_length}), "
            "or the longest sentences fit in no batch",
        )
        if self.params is not None:
            from petl_kernels.methods import parse_budget  # here: it loads PyTorch, which --help does without

            parse_budget(self.params)
        for size in (self.memory, self.host_memory):
            if size is not None:
                parse_size(size)
        if self.allow:
            from petl_kernels.planning.plan import check_allow  # here: it loads PyTorch

            self.allow = list(check_allow(self.allow))

    def _refuse_without_effect(self) -> None:
        """Raises InputError for options without an effect beside the others."""
        defaults = TrainConfig()
        for name in OF_A_NEW_MODEL if self.model and not self.is_new else ():
            _need(
                getattr(self, name) == getattr(defaults, name),
                f"{name} {getattr(self, name)!r}: no effect on a model that exists; expected it with --model new only",
            )
        _need(not self.allow or self.memory is not None, "allow: no effect without a budget; expected --memory with it")
        _need(
            self.host_memory is None or self.memory is not None,
            "host_memory: no effect without a budget; expected --memory with it",
        )
        _need(self.tier is None or self.plan is None, f"tier {self.tier}: no effect, since the plan has its own tiers")
        full = self.method == "full" or (self.is_new and self.method is None)
        _need(not full or self.params is None, f"params {self.params}: no effect, since all of the model is trained")

    def resolve(self, d_model: int) -> ResolvedConfig:
        """Returns the configuration with the defaults filled in that follow from the method and the model's width."""
        new = cast("ResolvedConfig", dataclasses.replace(self))
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
        """Returns the configuration of a mapping. Raises InputError for keys that are no fields."""
        return cls(**check_keys(values, where))


if TYPE_CHECKING:

    class ResolvedConfig(TrainConfig):
        """The configuration of a run, with all defaults filled in by ``resolve``."""

        method: str
        lr: float
        schedule: str
        warmup: int
        eval_every: int

else:
    ResolvedConfig = TrainConfig


def check_count(name: str, value: int | None) -> None:
    """Raises InputError unless ``value`` is at least 1 and at most 2^31 - 1, or None."""
    _need(value is None or value >= 1, f"{name} {value}: expected at least 1")
    _need(value is None or value < 2**31, f"{name} {value}: expected at most 2^31 - 1")


def require_bitsandbytes(what: str) -> None:
    """Raises InputError where bitsandbytes is missing or outside of the supported versions; ``what`` needs it."""
    installed = importlib.util.find_spec("bitsandbytes") is not None
    _need(installed, f"{what}: bitsandbytes is not installed; expected it (pip install 'petl-kernels[8bit]')")
    versions.check("bitsandbytes")


def default_lr(method: str, d_model: int, is_new: bool) -> float:
    """Returns the peak learning rate of a method at the width ``d_model``, to three digits."""
    if is_new:
        return float(f"{NEW_MODEL_LEARNING_RATE * (512 / d_model) ** 0.5:.3g}")
    from petl_kernels.methods import METHODS, Method  # here: it loads PyTorch

    rate = METHODS[method].config.learning_rate if method in METHODS else Method.learning_rate
    return float(f"{rate * 1024 / d_model:.3g}")


def check_keys(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns ``values`` as keyword arguments of ``TrainConfig``, with pairs in the place of their short forms.

    Raises InputError for unknown names and for values of another type.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping of option names to values, found {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in LANGUAGE_KEYS:
            continue
        if name not in fields:
            near = difflib.get_close_matches(name, [*fields, *LANGUAGE_KEYS], n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(fields)}"
            raise InputError(f"{where}: unknown option {key!r}{hint}")
        result[name] = typed(name, str(fields[name].type), value, where)
    if len(result) + sum(str(key).replace("-", "_") in LANGUAGE_KEYS for key in values) < len(values):
        twice = next(key for key in values if "-" in str(key) and str(key).replace("-", "_") in values)
        raise InputError(f"{where}: {twice} and {twice.replace('-', '_')}: one option, given twice")
    languages = [values.get(key, values.get(key.replace("_", "-"))) for key in LANGUAGE_KEYS]
    short = [name for name in ("train", "valid") if is_short(result.get(name, ()))]
    for key, language in zip(LANGUAGE_KEYS, languages, strict=True):
        _code(key, language, where)
        if language is not None and not short and (result.get("train") or result.get("valid")):
            raise InputError(f"{where}: {key} {language!r}: no effect, since every pair names its own languages")
    for name in ("train", "valid"):
        if name in result:
            result[name] = _pairs(result[name], languages, name, where)
    return result


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _choice(name: str, value: Any, choices: tuple) -> None:
    shown = ", ".join(str(c) for c in choices if c is not None)
    _need(value in choices, f"{name} {value!r}: expected one of {shown}")


def _pairs(items: list, languages: list[str | None], name: str, where: str) -> list[Pair]:
    """Returns the pairs of ``[SRC, TGT]`` with the languages beside it, or of a list of mappings or pairs."""
    if is_short(items):
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
        if isinstance(item, Mapping):
            for key in LANGUAGE_KEYS:
                _code(f"{name}: {key}", item[key], where)
    return [item if isinstance(item, Pair) else Pair(**{k: str(v) for k, v in item.items()}) for item in items]


def is_short(items) -> bool:
    """Returns whether a pair is given as two files, with its languages elsewhere."""
    return len(items) == 2 and all(isinstance(item, str) for item in items)


def _code(name: str, value: Any, where: str) -> None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {name} {value!r}: expected a language's code, in quotes ('no' for Norwegian)")
