"""Rows of ``petl-mt fits``: for each card, model and method the plan that training would have, or why there is none."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_outline
from petl_kernels.planning.cards import CARDS, Card, card_of
from petl_kernels.planning.levers import Request
from petl_kernels.planning.plan import PRECISIONS, Plan
from petl_kernels.planning.planner import card_planner

from ..config import TrainConfig
from ..models.adapt import prepare_model
from ..models.load import check_positions
from ..silence import hush
from ..terminal import say
from ..train.budget import widened, with_graphs_where_near

MODELS = {path.stem: path for path in sorted((Path(__file__).parent / "models").glob("*.json"))}
METHODS = ("lora", "adapter")  # those that are planned where none is named
ALL = "all"
CUDA = torch.device("cuda")
WITHOUT_A_CARD = "T4"  # the card that is planned for where none is named or here: that of free notebooks


@dataclass(frozen=True)
class Row:
    """A card, a model and a method by name; the plan, or the planner's line on why there is none."""

    card: str
    model: str
    method: str
    plan: Plan | None
    refusal: str = ""

    @property
    def tokens_a_second(self) -> float:
        """Padded tokens of the longer side that an update takes, over its predicted seconds. Raises ValueError."""
        if self.plan is None:
            raise ValueError("a row without a plan has no rate")
        return self.plan.batch_tokens / self.plan.seconds


def cards_named(names: Sequence[str]) -> list[str]:
    """Returns the names in ``CARDS`` of cards as a user writes them; the card here where none is named.

    Raises InputError for a name that is not in the table.
    """
    if ALL in names:
        return list(CARDS)
    return [_card_named(name) for name in names] if names else [_card_here()]


def _card_named(name: str) -> str:
    found = next((card for card in CARDS if _plain(card) == _plain(name)), None)
    if found is None:
        raise InputError(f"card {name!r}: not in the table; expected {', '.join(CARDS)}, or {ALL}")
    return found


def _card_here() -> str:
    if not torch.cuda.is_available():
        return WITHOUT_A_CARD
    name = torch.cuda.get_device_name()
    found = card_of(name)
    if found is None:
        raise InputError(
            f"card {name!r}, which is here: not in the table; expected --card with one of {', '.join(CARDS)}, or "
            "petl-mt plan, which measures the card that is here"
        )
    return found


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def model_named(name: str) -> tuple[str, str]:
    """Returns (name in tables, config or checkpoint) of a model as a user writes it: shipped, a file, a folder, an id.

    The name of a config.json is that of its folder.
    """
    if name.lower() in MODELS:
        return name.lower(), str(MODELS[name.lower()])
    path = Path(name)
    return (path.resolve().parent.name if path.name == "config.json" else path.stem), name


def plan_rows(
    cards: Sequence[str], models: Sequence[str], config: TrainConfig, methods: Sequence[str]
) -> Iterator[Row]:
    """Yields a row for each model, method and card, as soon as it is there.

    cards: names in ``CARDS``. models: names of ``MODELS``, or paths. config: the run that is planned, whose model,
    method and memory are those of the row. Raises InputError for a model or a method that there is not, and for
    settings that no run can have.
    """
    config = dataclasses.replace(config, memory=str(CARDS[cards[0]].memory))  # allow has an effect
    config.check_settings()
    for model, method in product(models, methods):
        name, source = model_named(model)
        for dtype in dict.fromkeys(CARDS[card].dtype for card in cards):
            began = time.monotonic()
            plan_for = _planner(source, dataclasses.replace(config, method=method), dtype)
            yield from (_row(card, name, method, plan_for) for card in cards if CARDS[card].dtype == dtype)
            say(f"{name} {method}: planned in {time.monotonic() - began:.0f} s ({PRECISIONS[dtype]})")


def _planner(source: str, config: TrainConfig, dtype: torch.dtype) -> Callable[[Card, bool], Plan]:
    """Returns the function of a card and of CUDA graphs that makes the plan of a run in ``dtype``."""
    with hush():
        model = cast("Any", load_outline(source))
    check_positions(model, config.max_length)
    model = prepare_model(model, dataclasses.replace(config, precision=PRECISIONS[dtype]))
    longest, allow = widened(config.max_length, CUDA), tuple(config.allow)
    given = config.batch_tokens, longest, config.optimizer, allow, CUDA, dtype, config.tier
    return card_planner(model, Request(*given, beam=0, packed=True))


def _row(card: str, model: str, method: str, plan_for: Callable[[Card, bool], Plan]) -> Row:
    try:
        return Row(card, model, method, with_graphs_where_near(lambda graphs: plan_for(CARDS[card], graphs)))
    except InputError as error:
        return Row(card, model, method, None, str(error))
