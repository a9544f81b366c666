"""The program `petl-mt`."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

try:
    from petl_kernels.errors import InputError
except ImportError as error:  # PyTorch or numpy is missing, or too old
    print(f"petl-mt: {error}", file=sys.stderr)
    raise SystemExit(2) from None

TRAIN_EXAMPLE = """examples:
  petl-mt train --model facebook/nllb-200-distilled-600M --train train.en train.sw --valid dev.en dev.sw \\
      --src-lang en --tgt-lang sw --method adapter --params 10% --out runs/en-sw
  petl-mt train --model new --pair en-de a.en a.de --pair de-en a.de a.en --valid-pair en-de d.en d.de \\
      --vocab-size 4000 --d-model 256 --layers 3 --steps 5000 --out runs/parent
"""


# Commands that stand beside their work: module (its add_parser adds the command) and what the overview says.
ELSEWHERE = {
    "demo": ("petl_mt.demo.demo", "the main job on text the package makes itself, no download"),
    "bench": ("petl_mt.bench", "benchmarks, their report, and what changed between two runs"),
    "study": ("petl_mt.study", "several methods and budgets on one pair: a table and a plot"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for wrong input or a full disk, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    try:
        arguments = _parser(command).parse_args(_tie_negative_values(argv))
        return arguments.run(arguments) or 0
    except InputError as error:
        message = str(error)
    except BrokenPipeError:
        return 141
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if type(error).__name__ == "AcceleratorError":
            message = f"the device failed ({str(error).splitlines()[0]}); a run goes on with --resume"
        elif type(error).__name__ == "OutOfMemoryError":
            message = "out of memory; expected a smaller --batch-tokens, or a --memory budget"
        else:
            raise
    print(f"petl-mt {command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag; argparse puts all the flags before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _tie_negative_values(argv: list[str]) -> list[str]:
    """``--params -3%`` as ``--params=-3%``: argparse would take the value for a flag, and say something else."""
    tied: list[str] = []
    for word in argv:
        if re.match(r"-\d", word) and tied and re.fullmatch(r"--[a-z-]+", tied[-1]):
            tied[-1] += f"={word}"
        else:
            tied.append(word)
    return tied


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(prog="petl-mt", description="Fine-tune translation models within a budget.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_finish(commands)
    _add_plan(commands)
    _add_translate(commands)
    _add_score(commands)
    _add_merge(commands)
    for name, (module, text) in ELSEWHERE.items():
        if name == command:
            importlib.import_module(module).add_parser(commands)
        else:
            commands.add_parser(name, help=text)
    doctor = commands.add_parser("doctor", help="versions, device, which backend serves each op, and does it agree")
    doctor.set_defaults(run=_doctor)
    return parser


def _version() -> str:
    from petl_kernels import __version__

    return f"petl-mt {__version__}"


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="adapt a model, or train a new one",
        epilog=TRAIN_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_train)
    _add_training_flags(parser)


def _add_finish(commands) -> None:
    parser = commands.add_parser("finish", help="end a stopped run where it stands: scores, and the adapter or model")
    parser.set_defaults(run=_finish)
    parser.add_argument("run_folder", metavar="RUN", help="the --out of a training run")


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="how training would fit into --memory, and how fast; reads no weights",
        description="Takes the flags of train. --model may be a config's JSON file alone; no text is needed.",
    )
    parser.set_defaults(run=_plan)
    _add_training_flags(parser)
    parser.add_argument("--device", metavar="cpu|cuda", help="plan for this; else for what is here")
    parser.add_argument("--json", metavar="FILE", help="write the plan there, for train --plan; - for standard output")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    flag = _Flags(parser)
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; flags go on top")
    flag("--model", metavar="DIR|ID|new", help="checkpoint folder, hub id, or new: train from scratch")
    flag("--out", metavar="DIR", help="folder for the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")

    text = parser.add_argument_group("text")
    flag("--train", nargs=2, metavar=("SRC", "TGT"), group=text)
    flag("--valid", nargs=2, metavar=("SRC", "TGT"), group=text)
    text.add_argument("--src-lang", metavar="CODE")
    text.add_argument("--tgt-lang", metavar="CODE")
    for name in ("--pair", "--valid-pair"):
        text.add_argument(
            name,
            nargs=3,
            action="append",
            metavar=("SRC-TGT", "SRC", "TGT"),
            help="languages such as en-de and two files; again for each further pair",
        )
    flag("--max-length", type=int, metavar="N", group=text, help="longer pairs (in tokens) are left out, and counted")
    flag("--bleu-tokenize", metavar="NAME", group=text, help="sacreBLEU tokenizer; else by target language")

    new = parser.add_argument_group("--model new")
    flag("--vocab-size", type=int, metavar="N", group=new)
    flag("--vocab-text", nargs="+", metavar="FILE", group=new, help="more text for the vocabulary only")
    flag("--character-coverage", type=float, metavar="SHARE", group=new)
    for name in ("--d-model", "--layers", "--ffn", "--heads"):
        flag(name, type=int, metavar="N", group=new)

    method = parser.add_argument_group("method")
    flag("--method", metavar="NAME", group=method, help="adapter, lora, prefix, bitfit, cross-attention, full, ...")
    flag("--params", metavar="BUDGET", group=method, help="trained parameters: 10%% of the model's, or 2M")
    method.add_argument("--method-arg", action="append", metavar="KEY=VALUE", help="a setting such as rank=16")

    loop = parser.add_argument_group("training")
    for name in (
        "--steps",
        "--batch-tokens",
        "--accumulate",
        "--warmup",
        "--seed",
        "--eval-every",
        "--patience",
        "--beam",
    ):
        flag(name, type=int, metavar="N", group=loop)
    for name in ("--lr", "--label-smoothing", "--dropout", "--attention-dropout", "--clip", "--weight-decay"):
        flag(name, type=float, metavar="X", group=loop)
    flag("--schedule", metavar="inverse-sqrt|linear|polynomial", group=loop)
    flag("--betas", nargs=2, type=float, metavar=("B1", "B2"), group=loop)
    flag("--optimizer", metavar="adamw|adamw8bit", group=loop)
    flag("--precision", metavar="fp32|bf16", group=loop)
    flag("--memory", metavar="SIZE", group=loop, help="all that training may take, such as 8GiB: see petl-mt plan")
    approximations = "quantised (frozen weights in 8 or 4 bits), 8bit-optimizer, bf16-gradients"
    flag("--allow", metavar="NAMES", type=_names, group=loop, help=f"what a plan may round: {approximations}")
    flag("--plan", metavar="FILE", group=loop, help="a plan that petl-mt plan has written, in place of one made now")
    flag("--tier", type=int, metavar="N", group=loop, help="memory tier of the layers, 1 to 5; 0: the model's own")
    graphs = "capture a step once for each shape of its batches, and replay it (CUDA; for small models)"
    flag("--cuda-graphs", action="store_true", group=loop, help=graphs)
    flag("--tensorboard", action="store_true", group=loop)


class _Flags:
    """Adds flags of TrainConfig. One that is not given is None, so that a value from a file stays."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        from .config import TrainConfig

        self.parser, self.defaults = parser, vars(TrainConfig())

    def __call__(self, name: str, group=None, **options) -> None:
        default = self.defaults[name[2:].replace("-", "_")]
        if default not in (None, "", False, []):
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            options["help"] = f"{options.get('help', '')} (default: {shown})".strip()
        (group or self.parser).add_argument(name, default=None, **options)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="the --out of a training run")
    parser.add_argument("--src-lang", metavar="CODE")
    parser.add_argument("--tgt-lang", metavar="CODE")
    parser.add_argument("--beam", type=int, metavar="N")
    parser.add_argument("--max-length", type=int, metavar="N", help="longer sources are cut, and counted")
    parser.add_argument("--batch-tokens", type=int, metavar="N")
    parser.add_argument("--memory", metavar="SIZE", help="all that it may take; else what the run was trained under")


def _add_translate(commands) -> None:
    parser = commands.add_parser("translate", help="lines from standard input to standard output")
    parser.set_defaults(run=_translate)
    _add_run(parser)


def _add_score(commands) -> None:
    parser = commands.add_parser("score", help="BLEU and chrF on a test text")
    parser.set_defaults(run=_score)
    _add_run(parser)
    parser.add_argument("--test", nargs=2, required=True, metavar=("SRC", "TGT"))
    parser.add_argument("--hypotheses", metavar="FILE", help="write the translations there")
    parser.add_argument("--bleu-tokenize", metavar="NAME")


def _add_merge(commands) -> None:
    parser = commands.add_parser("merge", help="a folder that transformers loads, the adapter inside the weights")
    parser.set_defaults(run=_merge)
    parser.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="the --out of a training run")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument(
        "--into",
        choices=("original", "quantised"),
        default="original",
        help="weights of a run that trained beside quantised ones: those of the checkpoint, or as it had them, rounded",
    )


def _train(arguments: argparse.Namespace) -> int:
    config = train_config(arguments)
    from .train import train

    train(config, resume=arguments.resume)
    return 0


def _finish(arguments: argparse.Namespace) -> int:
    from .train import finish

    finish(arguments.run_folder)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from .checks import check_file
    from .plan import plan, show

    if arguments.json and arguments.json != "-":
        check_file("json", arguments.json, [path for path in (arguments.model, arguments.config) if path])
    show(plan(train_config(arguments), arguments.device), arguments.json)
    return 0


def train_config(arguments: argparse.Namespace):
    """The configuration: of the run when resuming, else of --config, and flags on top of either."""
    from .config import TrainConfig, load_yaml
    from .runs import RunFolder

    values, where = {}, "flags"
    if arguments.config:
        values, where = load_yaml(arguments.config), arguments.config
    elif arguments.resume and arguments.out and RunFolder(Path(arguments.out)).config.exists():
        path = RunFolder(Path(arguments.out)).config
        values, where = load_yaml(path), str(path)
    elif arguments.resume and arguments.out and not arguments.model:
        raise InputError(f"out {arguments.out}: no run to resume; expected a run's folder, or --model for a new one")
    values = {key.replace("-", "_") if isinstance(key, str) else key: value for key, value in values.items()}
    own = ("run", "command", "config", "resume", "pair", "valid_pair", "method_arg", "device", "json")
    values.update({k: v for k, v in vars(arguments).items() if k not in own and v is not None})
    if arguments.pair and arguments.train:
        raise InputError("--train and --pair: expected one of the two")
    for name, pairs in (("train", arguments.pair), ("valid", arguments.valid_pair)):
        if pairs:
            values[name] = [_pair(*pair) for pair in pairs]
    if arguments.method_arg:
        values["method_args"] = dict(_setting(text) for text in arguments.method_arg)
    return TrainConfig.from_dict(values, where)


def _translate(arguments: argparse.Namespace) -> int:
    from .data import decode_lines
    from .runs import Translator

    with ExitStack() as limits:
        translator = Translator(arguments.run_folder, **_search(arguments), limits=limits)
        lines = decode_lines(sys.stdin.buffer.read(), "standard input")
        for text in translator.stream(lines):
            sys.stdout.buffer.write(text.encode("utf-8") + b"\n")
            sys.stdout.buffer.flush()
    _report_cut(translator)
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from petl_kernels.interop.files import atomic_write

    from .checks import check_file, check_two_files
    from .config import Pair
    from .data import read_pair
    from .evaluate import bleu_metric, score_lines
    from .runs import Translator

    check_two_files(Pair("", "", *arguments.test))
    if arguments.hypotheses:
        check_file("hypotheses", arguments.hypotheses, arguments.test)
    source, target = read_pair(Pair("", "", *arguments.test))
    if arguments.bleu_tokenize:
        bleu_metric("", arguments.bleu_tokenize)
    with ExitStack() as limits:
        translator = Translator(arguments.run_folder, **_search(arguments), limits=limits)
        hypotheses = list(translator.stream(source))
    if arguments.hypotheses:
        with atomic_write(arguments.hypotheses) as file:
            file.write("".join(line + "\n" for line in hypotheses))
    tokenize = arguments.bleu_tokenize or translator.config.bleu_tokenize
    for line in score_lines(hypotheses, target, translator.tgt_lang, tokenize).lines():
        print(line)
    _report_cut(translator)
    return 0


def _search(arguments: argparse.Namespace) -> dict:
    names = ("src_lang", "tgt_lang", "beam", "max_length", "batch_tokens", "memory")
    return {name: getattr(arguments, name) for name in names}


def _report_cut(translator) -> None:
    if translator.cut:
        print(f"{translator.cut} sources were longer than {translator.max_length} tokens and were cut", file=sys.stderr)


def _merge(arguments: argparse.Namespace) -> int:
    import petl_kernels as pk
    from petl_kernels.interop.adapters import check_free

    from .checks import check_folder, check_space
    from .runs import hush, load_run, quantise_as_trained, run_storages

    check_free(arguments.out)  # before anything is read
    check_folder("out", arguments.out)
    said = ""
    with hush():
        model, tokenizer, config = load_run(arguments.run_folder)
        check_space("out", arguments.out, sum(p.nbytes for p in model.parameters()), "the merged model")
        storages = run_storages(arguments.run_folder)
        named = " and ".join(kind for kind in dict.fromkeys(storages) if kind != "dense")
        if arguments.into == "quantised":
            quantise_as_trained(model, config, storages)
            pk.merge(model)
            error = pk.report(model).merge_error or 0.0
            said = f"merged into {named} weights with a relative error of at most {error:.3%}\n"
        elif named:
            said = f"the adapter was trained beside {named} weights; merged into the original ones\n"
        pk.save_merged(model, tokenizer, arguments.out)
    print(said, end="", file=sys.stderr)
    print(f"written: {arguments.out}", file=sys.stderr)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()


def _pair(languages: str, source: str, target: str) -> dict[str, str]:
    codes = languages.split("-")
    if len(codes) != 2 or not all(codes):
        raise InputError(f"pair {languages!r}: expected two language codes such as en-de")
    return {"src_lang": codes[0], "tgt_lang": codes[1], "source": source, "target": target}


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _setting(text: str) -> tuple[str, object]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"method-arg {text!r}: expected KEY=VALUE")
    try:
        return key.replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"method-arg {text!r}: expected KEY=VALUE, with a number, a word or a YAML list") from None


if __name__ == "__main__":
    sys.exit(main())
