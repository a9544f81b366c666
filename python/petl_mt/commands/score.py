"""``petl-mt score``: BLEU and chrF of a run on a test text."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from ..checks import check_file, check_two_files
from ..config import Pair
from ..terminal import Watch
from .options import FILES, add_run, search_options
from .translate import report_cut


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = add_run(parser)
    text.add_argument("--test", required=True, help="two text files, aligned; gzip too", **FILES)
    text.add_argument("--hypotheses", metavar="FILE", help="write the translations there (default: nowhere)")
    told = "sacreBLEU's tokenizer (default: the run's, else by target language)"
    text.add_argument("--bleu-tokenize", metavar="NAME", help=told)


def run_command(arguments: argparse.Namespace) -> None:
    from ..data import read_pair  # here, as what follows: they load PyTorch, which --help does without
    from ..inference import Translator
    from ..scores import bleu_metric, score_lines
    from .input_lines import check_other
    from .output_lines import OutputLines

    pair = Pair("", "", *arguments.test)
    check_two_files(pair)
    if arguments.hypotheses:
        check_file("hypotheses", arguments.hypotheses, arguments.test)
        for path in arguments.test:
            check_other(path, arguments.hypotheses, "--hypotheses")
    source, target = read_pair(pair)
    if arguments.bleu_tokenize:
        bleu_metric("", arguments.bleu_tokenize)
    not_written: OSError | None = None  # translations that cannot be written are scored all the same
    with ExitStack() as limits:
        output = arguments.hypotheses and limits.enter_context(OutputLines("--hypotheses", arguments.hypotheses))
        translator = Translator(arguments.run_folder, **search_options(arguments), limits=limits)
        hypotheses = []
        with Watch("score", len(source), "lines") as watch:
            for line in translator.stream(source, told=watch.at):
                hypotheses.append(line)
                if output and not_written is None:
                    try:
                        output.write([line])
                    except OSError as error:
                        not_written = error
        tokenize = arguments.bleu_tokenize or translator.config.bleu_tokenize
        for line in score_lines(hypotheses, target, translator.tgt_lang, tokenize).lines():
            print(line, flush=True)
        report_cut(translator)
        if not_written is not None:
            raise not_written
