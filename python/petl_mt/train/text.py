"""The text of a run: read, checked, and tokenised with the model's own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from petl_kernels.interop.languages import LanguagePair

from ..checks import check_files, check_same_text, names_of, text_sums
from ..config import TrainConfig
from ..data import Corpus, Counts, Text, encode_pairs, read_pair
from ..models.load import decoder_start
from ..runs import RunFolder
from ..scores import bleu_metric
from ..terminal import Watch


@dataclass(frozen=True)
class Lines:
    """The lines of a run's files."""

    train: list[Text]
    valid: list[Text]
    sums: dict[str, dict]  # size and checksum of each file, by path
    notes: list[str]  # lines on files that are given twice


@dataclass(frozen=True)
class TokenisedText:
    """The text of a run as its model reads it."""

    train: Corpus
    valid: Corpus | None
    valid_lines: list[Text]
    counts: list[Counts]  # of training and validation pairs
    languages: dict[str, LanguagePair]  # by the name of a pair
    start: int  # the id that decoder inputs begin with

    @property
    def nbytes(self) -> int:
        """The bytes of the tokenised pairs in host memory."""
        return self.train.nbytes + (self.valid.nbytes if self.valid else 0)


def read_text(config: TrainConfig, run: RunFolder, resuming: bool, quiet: bool) -> Lines:
    """Reads all files. Raises InputError for files that cannot be used, or that have changed since the run began."""
    notes, sums = check_files(config), text_sums(config)
    if resuming:
        check_same_text(run.text, sums)
    with Watch("reading text", 2 * len([*config.train, *config.valid]), "files", quiet) as watch:
        text: list[Text] = []
        for pair in [*config.train, *config.valid]:
            text.append((pair, *read_pair(pair)))
            watch.at(2 * len(text))
    for pair in config.valid:
        bleu_metric(pair.tgt_lang, config.bleu_tokenize)  # refused now, not after hours of training
    return Lines(text[: len(config.train)], text[len(config.train) :], sums, notes)


def tokenise(lines: Lines, config: TrainConfig, model, tokenizer, quiet: bool) -> TokenisedText:
    """Tokenises all lines. Raises InputError for languages that the model lacks, and where no pair is left."""
    pairs = {pair.name: pair for pair in [*config.train, *config.valid]}
    languages = {name: LanguagePair(model, tokenizer, pair.src_lang, pair.tgt_lang) for name, pair in pairs.items()}
    start = decoder_start(model, next(iter(languages.values())))
    with Watch("tokenising", sum(len(source) for _, source, _ in lines.train), "lines", quiet) as watch:
        train, counts = encode_pairs(lines.train, languages, config.max_length, "train", watch.at)
    valid = None
    if config.valid:
        valid, valid_counts = encode_pairs(lines.valid, languages, config.max_length, "valid")
        for count, name in zip(valid_counts, names_of(config.valid), strict=True):
            count.name = f"valid {name}"
        counts += valid_counts
    return TokenisedText(train, valid, lines.valid, counts, languages, start)
