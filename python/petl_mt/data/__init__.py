"""Parallel text: reading, tokenising once, and batches by a budget of tokens."""

from .batches import IGNORE, Batch, PackedBatch
from .corpus import Corpus, Position, Ragged, TrainBatches
from .encode import Counts, encode_pairs
from .text import Text, decode_lines, has_text, read_lines, read_pair

__all__ = [
    "IGNORE",
    "Batch",
    "Corpus",
    "Counts",
    "PackedBatch",
    "Position",
    "Ragged",
    "Text",
    "TrainBatches",
    "decode_lines",
    "encode_pairs",
    "has_text",
    "read_lines",
    "read_pair",
]
