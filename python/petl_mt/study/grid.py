"""The runs of a study: methods, their budgets of parameters, and what all runs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS, parse_budget

from ..config import Pair, TrainConfig

GRID = ("full", "adapter=10%,1%,0.1%", "lora=10%,1%,0.1%", "bitfit", "cross-attention", "prefix=1%")


@dataclass(frozen=True)
class Entry:
    """One run of the study: a method, and a budget where the method has a size."""

    method: str
    params: str | None = None

    @property
    def folder(self) -> str:
        return self.method if self.params is None else f"{self.method}-{self.params.replace('%', 'pct')}"


@dataclass
class StudyConfig:
    """A study; ``base`` has what all runs share: model, training and validation text, steps, seed, and ``out``."""

    base: TrainConfig
    test: Pair
    grid: Sequence[str] = GRID
    lr: Mapping[str, float] = field(default_factory=dict)  # method -> peak rate; the method's own default elsewhere

    def entries(self) -> list[Entry]:
        """Returns the runs in the order of the grid."""
        return parse_grid(self.grid)

    def folder(self, entry: Entry | None) -> Path:
        """Returns the folder of an entry's run; None stands for the parent as it is."""
        return Path(self.base.out) / "rows" / ("parent" if entry is None else entry.folder)

    def for_entry(self, entry: Entry) -> TrainConfig:
        """Returns the configuration of an entry's run."""
        return dataclasses.replace(
            self.base,
            method=entry.method,
            params=entry.params,
            lr=self.lr.get(entry.method, self.base.lr),
            out=str(self.folder(entry)),
        )


def parse_grid(grid: Sequence[str]) -> list[Entry]:
    """Returns the entries of a grid such as ``["adapter=10%,1%", "full"]``, in that order, each once.

    Raises InputError for unknown methods and for budgets that are none.
    """
    entries: list[Entry] = []
    for item in grid:
        method, equals, budgets = item.partition("=")
        if method not in METHODS:
            raise InputError(f"grid {item!r}: unknown method {method!r}, expected one of {', '.join(METHODS)}")
        if equals and not budgets:
            raise InputError(f"grid {item!r}: no budget after =, expected for example {method}=10%,1%")
        for budget in budgets.split(",") if equals else (None,):
            if budget is not None:
                parse_budget(budget)
            entries.append(Entry(method, budget))
    if not entries:
        raise InputError("grid: empty, expected entries such as adapter=10%,1% or full")
    return list(dict.fromkeys(entries))
