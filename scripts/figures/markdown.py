"""What all figures are written with: tables and numbers of a Markdown text, and what they were measured on."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]
Lines = list[str]


def hardware(stamp: Result) -> str:
    """What the figures were measured on."""
    return f"{stamp.get('gpu', stamp['processor'])}, commit {stamp['commit']}, seed {stamp['seed']}"


def table(columns: Lines, rows: list[Lines]) -> Lines:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
