"""Tables in documents, each between two markers that say which command writes it."""

from __future__ import annotations

from collections.abc import Sequence


def table(lines: Sequence[tuple[str, ...]], numbers: int) -> str:
    """Returns head and rows as a table of Markdown; the last ``numbers`` columns are figures."""
    head, *body = lines
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def filled(text: str, begin: str, end: str, table: str) -> str:
    """Returns ``text`` with ``table`` between its two markers, in the place of what was there."""
    before, rest = text.split(begin)
    after = rest.split(end, 1)[1]
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"
