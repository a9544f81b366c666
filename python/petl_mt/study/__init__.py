"""Methods against budgets of parameters, on one parent and one language pair (after arXiv 2205.11277)."""

from .grid import Entry, StudyConfig, parse_grid
from .rows import Row
from .run import run_study

__all__ = ["Entry", "Row", "StudyConfig", "parse_grid", "run_study"]
