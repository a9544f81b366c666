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

from .checks import check_file, check_folder, check_space, check_two_files
from .options import FILES, PAIR, TrainingOptions, languages
from .output import drop_unread, hold_closed_descriptors
from .progress import say

TRAIN_EXAMPLE = """examples:
  petl-mt train --model facebook/nllb-200-distilled-600M --train a.en a.sw \\
      --valid dev.en dev.sw --src-lang en --tgt-lang sw \\
      --method adapter --params 10% --out runs/en-sw
  petl-mt train --model new --pair en-de a.en a.de --pair de-en a.de a.en \\
      --valid-pair en-de dev.en dev.de --vocab-size 4000 --d-model 256 \\
      --layers 3 --steps 5000 --out runs/parent
"""


# Commands that stand beside their work: module (its add_parser adds the command) and what the overview says.
ELSEWHERE = {
    "demo": ("petl_mt.demo.demo", "the main job on text the package makes itself, no download"),
    "bench": ("petl_mt.bench", "benchmarks, their report, and what changed between two runs"),
    "study": ("petl_mt.study", "several methods and budgets on one pair: a table and a plot"),
    "methods": ("petl_mt.methods", "each method: what it trains, its settings with defaults and types"),
}

SHOWN = ("score", "plan", "study", "demo", "methods", "bench", "doctor")  # what they find is printed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for wrong input or a full disk, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    hold_closed_descriptors()
    try:
        try:
            if sys.stdout is None and command in SHOWN:
                raise InputError("standard output: is closed; expected it open, since the result goes there")
            arguments = _parser(command).parse_args(_tie_negative_values(argv))
            return arguments.run(arguments) or 0
        finally:  # what --help has printed, too: a reader that has gone is met here, and not when Python ends
            if sys.stdout is not None:
                sys.stdout.flush()
    except InputError as error:
        message = str(error)
    except BrokenPipeError:
        drop_unread()
        return 141
    except OSError as error:
        name = error.filename or ("''" if error.filename == "" else "")
        message = f"{name}: {error.strerror}" if name else str(error.strerror or error)
        drop_unread()
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if type(error).__name__ == "AcceleratorError":
            message = f"the device failed ({str(error).splitlines()[0]}); a run goes on with --resume"
        elif type(error).__name__ == "OutOfMemoryError":
            message = "out of memory; expected a smaller --batch-tokens, or a --memory budget"
        else:
            raise
    say(f"petl-mt {command}: {' '.join(message.split())}")
    return 2


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag; argparse puts all the flags before it. A flag is given once, unless it adds to a list;
    argparse would take the last one without a word."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.given: set[str] = set()
        self.register("action", None, _Store)
        self.register("action", "store", _Store)
        self.register("action", "store_true", _StoreTrue)
        self.register("action", "boolean", _Boolean)

    def parse_known_args(self, args=None, namespace=None):
        self.given = set()
        return super().parse_known_args(args, namespace)

    def once(self, action: argparse.Action, option: str | None) -> None:
        """End with a line where the option of ``action`` was there before."""
        if option is None:  # an argument without a flag
            return
        if action.dest in self.given:
            self.error(f"argument {action.option_strings[-1]}: given twice; expected it once")
        self.given.add(action.dest)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Store(argparse._StoreAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.once(self, option_string)
        super().__call__(parser, namespace, values, option_string)


class _Boolean(argparse.BooleanOptionalAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if self.dest in parser.given:
            parser.error(f"arguments {' and '.join(self.option_strings)}: given twice; expected one of them, once")
        parser.once(self, option_string)
        super().__call__(parser, namespace, values, option_string)


class _StoreTrue(argparse._StoreTrueAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.once(self, option_string)
        super().__call__(parser, namespace, values, option_string)


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
    run = parser.add_argument_group("run")
    run.add_argument("run_folder", metavar="RUN", help="the --out of a training run")


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="how training would fit into --memory, and how fast; reads no weights",
        description="Takes the options of train. --model may be a config's JSON file alone; no text is needed.",
    )
    parser.set_defaults(run=_plan)
    _add_training_flags(parser)
    planning = parser.add_argument_group("plan")
    planning.add_argument("--device", metavar="cpu|cuda", help="plan for this one (default: what is here)")
    told = "write the plan there, for train --plan; - for standard output (default: the table alone)"
    planning.add_argument("--json", metavar="FILE", help=told)


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = TrainingOptions()
    run = parser.add_argument_group("run")
    run.add_argument("--config", metavar="FILE.yaml", help="options from a file; flags go on top (default: none)")
    add(run, "--model", "--out")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out (default: off)")

    text = parser.add_argument_group("text")
    add(text, "--train", "--valid")
    languages(text)
    for name, what in (("--pair", "--train"), ("--valid-pair", "--valid")):
        told = f"{what} of one of several pairs: languages such as en-de, two files; again for each (default: none)"
        text.add_argument(name, help=told, **PAIR)
    add(text, "--max-length", "--bleu-tokenize")

    new = parser.add_argument_group("a model from scratch (--model new)")
    add(new, "--vocab-size", "--vocab-text", "--character-coverage", "--d-model", "--layers", "--ffn", "--heads")

    method = parser.add_argument_group("method")
    add(method, "--method", "--params")
    told = "a setting of the method such as rank=16, again for each; petl-mt methods has them (default: none)"
    method.add_argument("--method-arg", action="append", metavar="KEY=VALUE", help=told)

    loop = parser.add_argument_group("training")
    add(loop, "--steps", "--batch-tokens", "--accumulate", "--lr", "--schedule", "--warmup", "--label-smoothing")
    add(loop, "--dropout", "--attention-dropout", "--clip", "--optimizer", "--betas", "--weight-decay", "--seed")
    add(loop, "--eval-every", "--patience", "--beam", "--tensorboard")

    memory = parser.add_argument_group("memory and speed")
    add(memory, "--memory", "--allow", "--plan", "--tier", "--precision", "--cuda-graphs")


def _add_run(parser: argparse.ArgumentParser):
    """A finished run and how it searches; returns the group of text."""
    run = parser.add_argument_group("run")
    run.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="the --out of a training run")
    text = parser.add_argument_group("text")
    languages(text, "that of the run, where it has one pair")
    search = parser.add_argument_group("search")
    told = "beams; more are slower (default: the run's --beam)"
    search.add_argument("--beam", type=int, metavar="N", help=told)
    told = "longest source and translation, in tokens; longer sources are cut, and counted (default: the run's)"
    search.add_argument("--max-length", type=int, metavar="N", help=told)
    told = "tokens of a batch, padding and beams included (default: the run's)"
    search.add_argument("--batch-tokens", type=int, metavar="N", help=told)
    told = "bytes that all of it may take, such as 8GiB (default: the run's)"
    search.add_argument("--memory", metavar="SIZE", help=told)
    return text


def _add_translate(commands) -> None:
    parser = commands.add_parser(
        "translate",
        help="one line out for each line in, in order, as they come",
        description="Lines come out while others still come in: the first after 16, later ones in windows of up to "
        "--batch-tokens / 32 lines (128 at least), and at once where the input pauses for a tenth of a second.",
    )
    parser.set_defaults(run=_translate)
    text = _add_run(parser)
    text.add_argument("--in", dest="source", metavar="FILE", help="UTF-8 text to read (default: standard input)")
    told = "file to write; FILE.part until the last line is there (default: standard output)"
    text.add_argument("--out", dest="target", metavar="FILE", help=told)


def _add_score(commands) -> None:
    parser = commands.add_parser("score", help="BLEU and chrF on a test text, each with its signature")
    parser.set_defaults(run=_score)
    text = _add_run(parser)
    text.add_argument("--test", required=True, help="two text files, aligned; gzip too", **FILES)
    text.add_argument("--hypotheses", metavar="FILE", help="write the translations there (default: nowhere)")
    told = "sacreBLEU's tokenizer (default: the run's, else by target language)"
    text.add_argument("--bleu-tokenize", metavar="NAME", help=told)


def _add_merge(commands) -> None:
    parser = commands.add_parser("merge", help="a folder that transformers loads, the adapter inside the weights")
    parser.set_defaults(run=_merge)
    run = parser.add_argument_group("run")
    run.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="the --out of a training run")
    run.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    run.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="type of the weights that are written (default: that of the checkpoint which the run began with)",
    )
    run.add_argument(
        "--into",
        type=lambda name: "quantized" if name == "quantised" else name,  # the older spelling
        choices=("original", "quantized"),
        default="original",
        help="weights of a run that trained beside rounded ones: the checkpoint's, or rounded (default: original)",
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
    from .plan import plan, show

    if arguments.json and arguments.json != "-":
        check_file("json", arguments.json, [path for path in (arguments.model, arguments.config) if path])
    show(plan(train_config(arguments), arguments.device), arguments.json)
    return 0


def train_config(arguments: argparse.Namespace):
    """The configuration: of the run when resuming, else of --config, and flags on top of either."""
    from .config import TrainConfig, each_once, load_yaml
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
        values["method_args"] = each_once("method-arg", map(_setting, arguments.method_arg))
    return TrainConfig.from_dict(values, where)


def _translate(arguments: argparse.Namespace) -> int:
    from .output import LineSink
    from .progress import Watch, on_terminal
    from .runs import Translator
    from .stream import LineWindows, check_other

    check_other(arguments.source, arguments.target)
    lines = LineWindows(arguments.source)
    with LineSink("--out", arguments.target, lines.size) as sink, ExitStack() as limits:
        translator = Translator(arguments.run_folder, **_search(arguments), limits=limits)
        # on a terminal that shows the lines themselves, a bar would stand between them
        seen = arguments.target is None and on_terminal() and sys.stdout.isatty()
        with Watch("translate", lines.total, "lines", quiet=seen) as watch:
            for window in lines.windows(translator.window):
                before = sink.lines
                sink.write(list(translator.stream(window, told=lambda done, before=before: watch.at(before + done))))
                watch.at(sink.lines)
    _report_cut(translator)
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from .config import Pair
    from .data import read_pair
    from .evaluate import bleu_metric, score_lines
    from .output import LineSink
    from .progress import Watch
    from .runs import Translator
    from .stream import check_other

    check_two_files(Pair("", "", *arguments.test))
    if arguments.hypotheses:
        check_file("hypotheses", arguments.hypotheses, arguments.test)
        for path in arguments.test:
            check_other(path, arguments.hypotheses, "--hypotheses")
    source, target = read_pair(Pair("", "", *arguments.test))
    if arguments.bleu_tokenize:
        bleu_metric("", arguments.bleu_tokenize)
    failed = None  # to write translations; they are scored all the same
    with ExitStack() as limits:
        sink = arguments.hypotheses and limits.enter_context(LineSink("--hypotheses", arguments.hypotheses))
        translator = Translator(arguments.run_folder, **_search(arguments), limits=limits)
        hypotheses = []
        with Watch("score", len(source), "lines") as watch:
            for line in translator.stream(source, told=watch.at):
                hypotheses.append(line)
                if sink and failed is None:
                    failed = _written(sink, line)
        tokenize = arguments.bleu_tokenize or translator.config.bleu_tokenize
        for line in score_lines(hypotheses, target, translator.tgt_lang, tokenize).lines():
            print(line, flush=True)
        _report_cut(translator)
        if failed is not None:
            raise failed
    return 0


def _written(sink, line: str) -> OSError | None:
    try:
        sink.write([line])
    except OSError as error:
        return error
    return None


def _search(arguments: argparse.Namespace) -> dict:
    names = ("src_lang", "tgt_lang", "beam", "max_length", "batch_tokens", "memory")
    return {name: getattr(arguments, name) for name in names}


def _report_cut(translator) -> None:
    if translator.cut:
        say(f"{translator.cut} sources were longer than {translator.max_length} tokens and were cut")


def _merge(arguments: argparse.Namespace) -> int:
    import petl_kernels as pk
    from petl_kernels.interop.adapters import check_free

    from .runs import hush, load_run, merged_dtype, quantize_as_trained, run_storages

    check_free(arguments.out)  # before anything is read
    check_folder("out", arguments.out)
    said: list[str] = []
    with hush():
        model, tokenizer, config = load_run(arguments.run_folder)
        check_space("out", arguments.out, sum(p.nbytes for p in model.parameters()), "the merged model")
        storages = run_storages(arguments.run_folder)
        named = " and ".join(kind for kind in dict.fromkeys(storages) if kind != "dense")
        if arguments.into == "quantized":
            quantize_as_trained(model, config, storages)
            pk.merge(model)
            error = pk.report(model).merge_error or 0.0
            said.append(f"merged into {named} weights with a relative error of at most {error:.3%}")
        elif named:
            said.append(f"the adapter was trained beside {named} weights; merged into the original ones")
        rounding: list[str] = []
        dtype = merged_dtype(arguments.run_folder, arguments.dtype)
        pk.save_merged(model, tokenizer, arguments.out, dtype, rounding.append)
    for line in [*said, *rounding, f"written: {arguments.out}"]:
        say(line)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()


def _pair(languages: str, source: str, target: str) -> dict[str, str]:
    codes = languages.split("-")
    if len(codes) != 2 or not all(codes):
        raise InputError(f"pair {languages!r}: expected two language codes such as en-de")
    return {"src_lang": codes[0], "tgt_lang": codes[1], "source": source, "target": target}


def _setting(text: str) -> tuple[str, object]:
    import yaml

    from .config import parse_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"method-arg {text!r}: expected KEY=VALUE")
    try:
        return key.replace("-", "_"), parse_yaml(value)
    except yaml.YAMLError:
        raise InputError(f"method-arg {text!r}: expected KEY=VALUE, with a number, a word or a YAML list") from None


if __name__ == "__main__":
    sys.exit(main())
