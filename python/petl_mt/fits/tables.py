"""The rows of ``petl-mt fits`` as lines of a terminal and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from petl_kernels.planning.cards import CARDS, HOST_COPIES, MEASURED, Card
from petl_kernels.planning.plan import PRECISIONS, Plan, levers_text
from petl_kernels.units import format_size

from .rows import Row

PREDICTED = """\
Bytes are counted, as in every plan. **Tokens a second are predictions**, of a card at work without a pause: the padded
tokens of an update's longer side over the seconds that its matrix products take at the card's rate and its frozen
weights at the rate of memory, or over those of the copies from host memory where these take longer. Attention,
element-wise kernels, the optimiser and the host are left out, so a run is slower: the one step that was measured on a
card (M2M-418M's shape, LoRA, 8,192 tokens, [PERFORMANCE.md](PERFORMANCE.md)) kept an H200 busy for twice as long, and
took six times that by the clock before steps were captured. They order cards and ways rather than promise a time."""
WORDS = """\
"Way": micro-batches of an update, the tier of the layers (how much they compute again, 1 the least), layers streamed
from host memory, the storage of frozen weights where it is not 16 bits, and whether steps are captured as CUDA graphs.
Every way is exact unless it names a storage, an optimiser or gradients of fewer bits."""


def heading() -> str:
    return f"{'card':<10} {'model':<15} {'method':<8} {'peak':>8} {'tokens/s':>9}  way (tokens/s are predictions)"


def line(row: Row) -> str:
    """Returns the row as a line of a terminal."""
    first = f"{row.card:<10} {row.model:<15} {row.method:<8}"
    if row.plan is None:
        return f"{first} {'-':>8} {'-':>9}  {row.refusal}"
    return f"{first} {format_size(row.plan.peak):>8} {rate(row):>9}  {way(row.plan)}"


def way(plan: Plan) -> str:
    """Returns the levers of ``plan`` in words."""
    return levers_text(plan) + ("; CUDA graphs" if plan.cuda_graphs else "")


def rate(row: Row) -> str:
    """Returns the predicted tokens a second with two figures, "-" for a row without a plan."""
    return "-" if row.plan is None else f"{float(f'{row.tokens_a_second:.2g}'):,.0f}"


def page(rows: Sequence[Row], command: str, about: Mapping[str, Any]) -> str:
    """Returns the rows as a page: an overview of each method, the cards, and what fits on each.

    command: what has made the page. about: versions and commit of the machine that has.
    """
    lines = [
        "# What fits where",
        "",
        _made(rows, command, about),
        "",
        PREDICTED,
        "",
        WORDS,
        "",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        lines += [f"## {method}: predicted tokens a second", "", *_overview(rows, method), ""]
    lines += ["## Cards", "", *_cards(rows), ""]
    for card in dict.fromkeys(row.card for row in rows):
        lines += [f"## {card}", "", *_details([row for row in rows if row.card == card]), ""]
    return "\n".join(lines)


def _made(rows: Sequence[Row], command: str, about: Mapping[str, Any]) -> str:
    """Returns the paragraph on what has made the page, and for which updates."""
    there = f"on a machine with {about['device']};" if "device" in about else "on a CPU: no card was there and"
    versions = f"PyTorch {about['torch']}, transformers {about['transformers']}"
    made = f"Made by `{command}` at {about.get('commit', 'no commit')} ({versions}), {there} nothing was downloaded."
    update = next((row.plan for row in rows if row.plan is not None), None)
    if update is not None:
        made += f" Updates of {update.batch_tokens:,} tokens in sentences of up to {update.longest}."
    return f"{made} Tables of one card or model: `petl-mt fits --help`."


def _overview(rows: Sequence[Row], method: str) -> list[str]:
    """Returns a table of models by cards: "-" where nothing fits."""
    found = {(row.model, row.card): rate(row) for row in rows if row.method == method}
    models, cards = (list(dict.fromkeys(key[i] for key in found)) for i in range(2))
    body = [[model, *(found.get((model, card), "") for card in cards)] for model in models]
    return _table(["model", *cards], body)


def _cards(rows: Sequence[Row]) -> list[str]:
    """Returns the table of cards and what its columns mean."""
    names = dict.fromkeys(row.card for row in rows)
    body = [_card_cells(name, CARDS[name]) for name in names]
    told = f"Of a published rate a plan takes the share that is in brackets, and of PCIe's {HOST_COPIES:.0%}: an "
    told += "assumption, where nothing was measured. Memory is what CUDA reports, rounded down; a plan leaves 4% of it "
    told += "and 600 MiB to the allocator and the driver."
    return [*_table(["card", "memory", "dtype", "products", "memory's rate", "PCIe", "source"], body), "", told]


def _card_cells(name: str, card: Card) -> list[str]:
    dtype = PRECISIONS[card.dtype]
    return [
        name,
        format_size(card.memory),
        dtype,
        _shown_rate(card, dtype, 1e12, "TFLOP/s"),
        _shown_rate(card, "bandwidth", 1e9, "GB/s"),
        f"{card.host / 1e9:.3g} GB/s, {card.kind('host')}",
        card.source,
    ]


def _shown_rate(card: Card, name: str, unit: float, words: str) -> str:
    kind = card.kind(name)
    if kind == MEASURED:
        return f"{card.rate(name) / unit:,.4g} {words}, {kind}"
    published = getattr(card, name)
    return f"{published / unit:,.4g} {words}, {kind} ({card.rate(name) / published:.0%})"


def _details(rows: Sequence[Row]) -> list[str]:
    fitting = [
        [row.model, row.method, format_size(row.plan.peak), rate(row), way(row.plan)] for row in rows if row.plan
    ]
    refused = [f"- {row.model}, {row.method}: {row.refusal}" for row in rows if row.plan is None]
    table = _table(["model", "method", "peak", "tokens a second", "way"], fitting) if fitting else []
    return [*table, *([""] if table and refused else []), *refused]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
