"""EB-NeRD: impressions in behaviors.parquet, and each user's earlier reads in history.parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.trace.arrow import open_parquet, pyarrow
from mtserve.trace.csr import gather, offsets_of
from mtserve.trace.importers.assemble import Draft, number_users
from mtserve.trace.importers.config import ImportConfig, keeps
from mtserve.trace.schema import Ints, Progress, TraceLimits

BEHAVIORS = ("user_id", "impression_time", "session_id", "article_ids_inview", "article_ids_clicked")
HISTORY = ("user_id", "impression_time_fixed", "article_id_fixed")


def read(paths: Sequence[Path], config: ImportConfig, limits: TraceLimits, progress: Progress | None) -> Draft:
    """Files are told apart by their columns; without a history file, histories are empty.

    Times without a zone are read as UTC. Uses user_share, seed; sessions are the log's own.
    """
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for path in paths:
        file = open_parquet(path, limits.row_group_bytes)
        names = set(file.schema_arrow.names)
        wanted = next((columns for columns in (BEHAVIORS, HISTORY) if set(columns) <= names), None)
        if wanted is None:
            raise InvalidArgument(
                f"{path}: has neither {', '.join(BEHAVIORS)} nor {', '.join(HISTORY)}", field="columns"
            )
        for block in _blocks(path, file, wanted, config, progress):
            for name, column in block.items():
                parts.setdefault(name, []).append(column)
    if "user" not in parts:
        raise InvalidArgument("no file has the columns of behaviors.parquet", field="paths")
    columns: dict[str, Any] = {
        name: np.concatenate(parts.get(name, [np.empty(0, np.int64)])) for name in (*parts, "history_user")
    }
    user_ids, numbers = number_users(np.concatenate([columns["user"], columns.pop("history_user")]))
    count = len(columns["user"])
    columns["user"] = numbers[:count]
    return Draft(user_ids=user_ids, history_user=numbers[count:], **columns)


def _blocks(
    path: Path, file: Any, wanted: tuple[str, ...], config: ImportConfig, progress: Progress | None
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    groups = file.metadata.num_row_groups
    for number in range(groups):
        table = file.read_row_group(number, columns=list(wanted)).combine_chunks()
        read_column = _Columns(f"{path}: row group {number}", table)
        users = read_column.plain("user_id")
        kept = np.flatnonzero(keeps(users, config))
        yield _requests(read_column, users, kept) if wanted == BEHAVIORS else _histories(read_column, users, kept)
        if progress is not None:
            progress(number + 1, groups)


def _requests(read_column: _Columns, users: Ints, kept: Ints) -> dict[str, npt.NDArray[Any]]:
    cand_lengths, cand = read_column.lists("article_ids_inview", kept)
    clicked_lengths, clicked = read_column.lists("article_ids_clicked", kept)
    return {
        "user": users[kept],
        "t_ms": read_column.plain("impression_time")[kept],
        "session": read_column.plain("session_id")[kept],
        "cand_lengths": cand_lengths, "cand": cand, "clicked_lengths": clicked_lengths, "clicked": clicked,
    }  # fmt: skip


def _histories(read_column: _Columns, users: Ints, kept: Ints) -> dict[str, npt.NDArray[Any]]:
    lengths, items = read_column.lists("article_id_fixed", kept)
    time_lengths, t_ms = read_column.lists("impression_time_fixed", kept)
    if (lengths != time_lengths).any():
        raise InvalidArgument(
            f"{read_column.where}: differs in length from article_id_fixed", field="impression_time_fixed"
        )
    return {"history_user": np.repeat(users[kept], lengths), "history_t_ms": t_ms, "history_items": items}


class _Columns:
    """The columns of one row group as int64; times become ms since the epoch. `where` is for errors."""

    def __init__(self, where: str, table: Any) -> None:
        self.where, self.table = where, table

    def plain(self, name: str) -> Ints:
        return self._int64(name, self.table[name].combine_chunks())

    def lists(self, name: str, rows: Ints) -> tuple[Ints, Ints]:
        """(lengths, values) of the lists in `rows`; a null list is empty."""
        column = self.table[name].combine_chunks()
        if not hasattr(column, "flatten") or not hasattr(column, "value_lengths"):
            raise InvalidArgument(f"{self.where}: expected lists, got {column.type}", field=name)
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        values = self._int64(name, column.flatten())
        return lengths[rows], values[gather(offsets_of(lengths), rows)]

    def _int64(self, name: str, column: Any) -> Ints:
        pa = pyarrow()
        if column.null_count:
            raise InvalidArgument(f"{self.where}: holds a null", field=name)
        try:
            if pa.types.is_timestamp(column.type):
                column = column.cast(pa.timestamp("ms", tz=column.type.tz), safe=False)
            values: Ints = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise InvalidArgument(f"{self.where}: expected integers or times: {error}"[:300], field=name) from None
        return values
