"""Bounded reading of text files, plain or gzip: lines and CSV columns, errors naming file and line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument, NotFound
from mtserve.trace.schema import Progress

Columns = dict[str, npt.NDArray[Any]]

PROGRESS_LINES = 8192
BLOCK_BYTES = 16 << 20


def lines(path: Path, limit: int, progress: Progress | None = None) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end). progress: (bytes of the file read, bytes in all).

    Raises InvalidArgument for a line longer than `limit` bytes or a damaged gzip file.
    """
    for number, line in _numbered(path, limit, progress):
        if len(line) > limit:
            raise InvalidArgument(f"{path}:{number}: longer than {limit} bytes", field="line")
        yield number, line


def _numbered(path: Path, limit: int, progress: Progress | None) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise NotFound(f"{path} is not a file", field="path")
    size = path.stat().st_size
    number = 0
    with path.open("rb") as raw:
        packed = path.suffix == ".gz"
        file = io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), 1 << 20) if packed else raw  # type: ignore[type-var,arg-type]
        try:
            # Two more than the limit: a line of exactly `limit` bytes and its line end.
            while line := file.readline(limit + 2):
                number += 1
                if progress is not None and number % PROGRESS_LINES == 0:
                    progress(min(raw.tell(), size), size)
                yield number, line.rstrip(b"\r\n")
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidArgument(f"{path}:{number + 1}: damaged file: {error}", field="line") from None
    if progress is not None:
        progress(size, size)


def csv_columns(
    path: Path, wanted: Mapping[str, type], optional: Mapping[str, type], progress: Progress | None = None
) -> Iterator[Columns]:
    """Blocks of a comma-separated file with a header: the columns named in `wanted`, and those of `optional` it has.

    Types are np.int64 or np.float64. A line may hold 64 KiB.
    Raises InvalidArgument naming file, line and column where a value is no such number.
    """
    source = lines(path, 1 << 16, progress)
    header = _header(path, next(source, (1, b""))[1])
    for name in wanted:
        if name not in header:
            raise InvalidArgument(f"{path}:1: no such column; there are {', '.join(header)}"[:500], field=name)
    types = {**wanted, **{name: kind for name, kind in optional.items() if name in header}}
    places = [header.index(name) for name in types]
    block: list[str] = []
    first, size = 2, 0
    for number, line in source:
        try:
            block.append(line.decode("ascii"))
        except UnicodeDecodeError:
            raise InvalidArgument(f"{path}:{number}: not ASCII", field="line") from None
        size += len(line)
        if size > BLOCK_BYTES:
            yield _parse(path, first, block, types, places)
            first, size, block = number + 1, 0, []
    if block:
        yield _parse(path, first, block, types, places)


def _header(path: Path, line: bytes) -> list[str]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path}:1: not UTF-8", field="header") from None
    return [name.strip().strip('"') for name in text.split(",")]


def _parse(path: Path, first: int, block: list[str], types: dict[str, type], places: list[int]) -> Columns:
    for index, line in enumerate(block):
        if not line or line.isspace():  # loadtxt would skip it, and the line numbers with it
            raise InvalidArgument(f"{path}:{first + index}: empty line", field="line")
    dtype = np.dtype(list(types.items()))
    try:
        rows = np.loadtxt(block, dtype=dtype, delimiter=",", comments=None, quotechar='"', usecols=places, ndmin=1)
    except (ValueError, OverflowError, IndexError) as error:
        raise _blame(path, first, block, types, places, error) from None
    return {name: rows[name] for name in types}


def _blame(
    path: Path, first: int, block: list[str], types: dict[str, type], places: list[int], error: Exception
) -> InvalidArgument:
    """The error again, with the line and the column it comes from."""
    for number, line in enumerate(block, first):
        cells = line.split(",")
        for (name, kind), place in zip(types.items(), places, strict=True):
            cell = cells[place].strip('" ') if place < len(cells) else ""
            try:
                kind(float(cell) if kind is np.float64 else int(cell))
            except (ValueError, OverflowError):
                what = "a number" if kind is np.float64 else "an int64"
                return InvalidArgument(f"{path}:{number}: {cell[:80]!r} is not {what}", field=name)
    return InvalidArgument(f"{path}:{first}: {error}"[:500], field="line")
