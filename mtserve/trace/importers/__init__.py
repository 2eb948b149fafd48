"""Importers of public logs: KuaiRand, EB-NeRD, MIND and MovieLens files to a `Trace`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

from mtserve.errors import InvalidArgument, NotFound
from mtserve.trace.importers import ebnerd, kuairand, mind, movielens
from mtserve.trace.importers.assemble import Draft, assemble
from mtserve.trace.importers.config import ImportConfig
from mtserve.trace.reshape import fold_history
from mtserve.trace.schema import Progress, Trace, TraceLimits, TraceMeta

Importer: TypeAlias = Callable[[Sequence[Path], ImportConfig, TraceLimits, Progress | None], Draft]

IMPORTERS: dict[str, tuple[Importer, str]] = {
    "kuairand": (kuairand.read, "KuaiRand log_standard_*.csv"),
    "ebnerd": (ebnerd.read, "EB-NeRD behaviors.parquet and history.parquet"),
    "mind": (mind.read, "MIND behaviors.tsv"),
    "movielens": (movielens.read, "MovieLens ratings.csv"),
}
"""By kind: the importer, and the files it wants."""


def import_trace(
    kind: str,
    paths: str | Path | Sequence[str | Path],
    config: ImportConfig | None = None,
    limits: TraceLimits | None = None,
    progress: Progress | None = None,
) -> Trace:
    """The trace in the files of a public log; `kind` is one of IMPORTERS.

    progress: called with (done, total) of the file being read. `meta.changes` of the result
    counts what had to be altered. Raises InvalidArgument naming file, line (or row) and column,
    NotFound for a missing file, FailedPrecondition where pyarrow is needed and absent.
    """
    if kind not in IMPORTERS:
        raise InvalidArgument(f"{kind!r} is not one of {', '.join(IMPORTERS)}", field="kind")
    config, limits = config or ImportConfig(), limits or TraceLimits()
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not files:
        raise InvalidArgument("needs at least one file", field="paths")
    for path in files:
        if not path.is_file():
            raise NotFound(f"{path} is not a file", field="paths")
    importer, source = IMPORTERS[kind]
    meta = TraceMeta(name=config.name or kind, source=source, seed=config.seed, config=asdict(config))
    trace = assemble(importer(files, config, limits, progress), meta, config.session_gap_s * 1000, limits)
    return fold_history(trace, config.history_share) if config.history_share else trace
