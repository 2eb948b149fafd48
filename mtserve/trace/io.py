"""Reading and writing trace files; the suffix names the format: .jsonl, .jsonl.gz or .parquet."""

from __future__ import annotations

import os
from pathlib import Path

from mtserve.errors import InvalidArgument, NotFound
from mtserve.trace import jsonl, parquet
from mtserve.trace.schema import Progress, Trace, TraceLimits

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def trace_format(path: str | Path) -> str:
    """The suffix of SUFFIXES that `path` has. Raises InvalidArgument when it has none."""
    for suffix in SUFFIXES:
        if str(path).endswith(suffix):
            return suffix
    raise InvalidArgument(f"{path} does not end in {', '.join(SUFFIXES)}", field="path")


def read_trace(path: str | Path, limits: TraceLimits | None = None, progress: Progress | None = None) -> Trace:
    """The trace in `path`.

    progress: called with (done, total), bytes of a text file or row groups of a Parquet file.
    Raises NotFound when there is no such file, InvalidArgument naming file, line (or row) and
    field where the content is no trace or passes `limits`.
    """
    suffix = trace_format(path)
    if not Path(path).is_file():
        raise NotFound(f"{path} is not a file", field="path")
    reader = parquet.read if suffix == ".parquet" else jsonl.read
    return reader(Path(path), limits or TraceLimits(), progress)


def write_trace(trace: Trace, path: str | Path, progress: Progress | None = None) -> None:
    """Write `trace` to `path`, whole or not at all: an existing file is replaced at the end.

    progress: called with (done, total), users and requests written. The same trace gives the
    same bytes. Raises InvalidArgument for an unknown suffix.
    """
    suffix = trace_format(path)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    writer = parquet.write if suffix == ".parquet" else jsonl.write
    try:
        writer(trace, partial, suffix, progress)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
