"""Ragged columns: flat values and the offsets where each row starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


def offsets_of(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """int64 [rows + 1]: row r is values[offsets[r]:offsets[r + 1]]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def exclusive_sums(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """int64 [n]: entry i is the sum of the entries before i."""
    return offsets_of(values)[:-1]


def rank_in_group(sorted_groups: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """int64 [n]: 0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(sorted_groups), dtype=np.int64)
    if not len(index):
        return index
    starts = np.concatenate([[True], sorted_groups[1:] != sorted_groups[:-1]])
    return index - np.maximum.accumulate(np.where(starts, index, 0))


def earlier_in_group(groups: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """int64 [n]: entry i is the sum of the entries before i that are of the same group."""
    order = np.argsort(groups, kind="stable")
    sums = exclusive_sums(values[order])
    sums -= sums[np.arange(len(order)) - rank_in_group(groups[order])]
    result = np.empty(len(order), dtype=np.int64)
    result[order] = sums
    return result


def gather(offsets: npt.NDArray[np.int64], rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Positions in the flat values of the given rows, one row after the other."""
    lengths = np.diff(offsets)[rows]
    starts = offsets_of(lengths)
    shifts = np.repeat(offsets[:-1][rows] - starts[:-1], lengths)
    return shifts + np.arange(starts[-1], dtype=np.int64)


def cuts(offsets: npt.NDArray[np.int64], rows: int, values: int) -> Iterator[tuple[int, int]]:
    """Blocks (first row, end row) in order, of at most `rows` rows and, where a row alone is not more, `values` values."""
    first, total = 0, len(offsets) - 1
    while first < total:
        end = int(np.searchsorted(offsets, offsets[first] + values, side="right")) - 1
        end = min(max(end, first + 1), first + rows, total)
        yield first, end
        first = end
