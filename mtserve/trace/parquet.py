"""The trace as one Parquet file: the rows of the JSON form, a column a field, read and written by row groups.

Columns: kind, user, t_ms, session, cand, clicked (requests), times, items (histories), actions
(both; null where every behaviour is a click). The metadata key `mtserve.trace` holds the meta object.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.trace.arrow import open_parquet, pyarrow
from mtserve.trace.csr import cuts, offsets_of
from mtserve.trace.meta import meta_from_json, meta_to_json
from mtserve.trace.schema import CLICK, Ints, Progress, SmallInts, Trace, TraceLimits, TraceMeta
from mtserve.types import MAX_USER_ID_BYTES

META_KEY = b"mtserve.trace"
ROWS = 131_072
GROUP_VALUES = 4 << 20  # items of one row group, unless one row has more
COLUMNS = ("kind", "user", "t_ms", "session", "cand", "clicked", "times", "items", "actions")
REQUIRED = ("kind", "user", "t_ms", "cand", "clicked", "times", "items")


def _schema(pa: Any) -> Any:
    ints = pa.list_(pa.int64())
    types = (pa.string(), pa.string(), pa.int64(), pa.int64(), ints, ints, ints, ints, pa.list_(pa.int32()))
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


def write(trace: Trace, path: Path, suffix: str, progress: Progress | None = None) -> None:
    """Write all histories, then all requests, each row group of one kind."""
    pa = pyarrow()
    schema = _schema(pa).with_metadata({META_KEY: meta_to_json(trace.meta).encode()})
    total, done = trace.users + trace.requests, 0
    with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows, columns in _blocks(pa, trace):
            arrays = [columns.get(name, pa.nulls(rows, schema.field(name).type)) for name in COLUMNS]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=rows)
            done += rows
            if progress is not None:
                progress(done, total)


def _blocks(pa: Any, trace: Trace) -> Iterator[tuple[int, dict[str, Any]]]:
    """(rows, Arrow arrays by column) of each row group."""
    users = pa.array(trace.user_ids, pa.string())
    for first, last in cuts(trace.history_offsets, ROWS, GROUP_VALUES):
        ends = trace.history_offsets[first : last + 1]
        part = slice(ends[0], ends[-1])
        columns = {"user": users[first:last], **_lists(pa, ends, part, times=trace.history_t_ms)}
        columns |= _lists(pa, ends, part, items=trace.history_items)
        yield last - first, _common(pa, "history", ends, trace.history_actions[part], columns)
    for first, last in cuts(trace.cand_offsets + trace.clicked_offsets, ROWS, GROUP_VALUES):
        rows, ends = slice(first, last), trace.clicked_offsets[first : last + 1]
        part = slice(ends[0], ends[-1])
        columns = {"user": users.take(pa.array(trace.user[rows]))}
        columns |= {"t_ms": pa.array(trace.t_ms[rows]), "session": pa.array(trace.session[rows])}
        columns |= _lists(pa, ends, part, clicked=trace.clicked_items)
        ends_cand = trace.cand_offsets[first : last + 1]
        columns |= _lists(pa, ends_cand, slice(ends_cand[0], ends_cand[-1]), cand=trace.cand_items)
        yield last - first, _common(pa, "request", ends, trace.clicked_actions[part], columns)


def _lists(pa: Any, ends: Ints, part: slice, **values: npt.NDArray[Any]) -> dict[str, Any]:
    starts = pa.array((ends - ends[0]).astype(np.int32))
    return {name: pa.ListArray.from_arrays(starts, pa.array(column[part])) for name, column in values.items()}


def _common(pa: Any, kind: str, ends: Ints, actions: SmallInts, columns: dict[str, Any]) -> dict[str, Any]:
    columns["kind"] = pa.array([kind]).take(pa.array(np.zeros(len(ends) - 1, dtype=np.int32)))
    if (actions != CLICK).any():
        columns |= _lists(pa, ends, slice(None), actions=actions)
    return columns


def read(path: Path, limits: TraceLimits, progress: Progress | None = None) -> Trace:
    """The trace in `path`. Raises InvalidArgument naming file, row (from 1) and field."""
    file = open_parquet(path, limits.row_group_bytes)
    if file.metadata.num_rows > limits.requests + limits.users:
        raise InvalidArgument(f"{path}: {file.metadata.num_rows} rows are above the limits", field="rows")
    for name in REQUIRED:
        if name not in file.schema_arrow.names:
            raise InvalidArgument(f"{path}: no such column", field=name)
    reader = _Reader(path, limits)
    text = (file.schema_arrow.metadata or {}).get(META_KEY)
    meta = meta_from_json(text, str(path)) if text else TraceMeta(name=path.name.split(".")[0])
    for number in range(file.metadata.num_row_groups):
        reader.take(file, number)
        if progress is not None:
            progress(number + 1, file.metadata.num_row_groups)
    return reader.trace(meta)


class _Reader:
    """Columns of the row groups so far; `first_row` is the number of the current group's first row."""

    def __init__(self, path: Path, limits: TraceLimits) -> None:
        self.path, self.limits = path, limits
        self.first_row = 1
        self.users: dict[str, int] = {}
        self.previous_ms = 0
        self.requests = 0
        self.last_ms: dict[int, int] = {}
        self.columns: dict[str, list[npt.NDArray[Any]]] = {}

    def fail(self, row: int, field: str, why: str) -> NoReturn:
        raise InvalidArgument(f"{self.path}: row {self.first_row + row}: {why}", field=field)

    def refuse(self, rows: Ints, wrong: npt.NDArray[np.bool_], field: str, why: str) -> None:
        """Fail at the first of `rows` where `wrong`."""
        if wrong.any():
            self.fail(int(rows[int(np.argmax(wrong))]), field, why)

    def take(self, file: Any, number: int) -> None:
        table = self.cast(
            file, file.read_row_group(number, columns=[n for n in COLUMNS if n in file.schema_arrow.names])
        )
        user, is_request = self.users_of(table)
        histories, requests = np.flatnonzero(~is_request), np.flatnonzero(is_request)
        if len(histories):
            self.take_histories(table.take(histories), histories, user[histories])
        if len(requests):
            self.take_requests(table.take(requests), requests, user[requests])
        self.first_row += table.num_rows

    def cast(self, file: Any, table: Any) -> Any:
        """`table` with exactly the columns and types of the schema; absent ones null."""
        pa = pyarrow()
        columns = []
        for field in _schema(pa):
            try:
                known = field.name in table.column_names
                column = table[field.name].cast(field.type) if known else pa.nulls(table.num_rows, field.type)
            except pa.ArrowException as error:
                self.fail(0, field.name, f"expected {field.type}: {error}"[:300])
            columns.append(column)
        return pa.Table.from_arrays(columns, schema=_schema(pa)).combine_chunks()

    def users_of(self, table: Any) -> tuple[SmallInts, npt.NDArray[np.bool_]]:
        """User index of every row, and which rows are requests."""
        kinds, names, users = table["kind"].to_pylist(), table["user"].to_pylist(), self.users
        index = np.empty(table.num_rows, dtype=np.int32)
        for row, (kind, name) in enumerate(zip(kinds, names, strict=True)):
            if kind not in ("history", "request"):
                self.fail(row, "kind", f"{str(kind)[:80]!r} is not history or request")
            known = users.get(name)
            if known is None:
                known = self.add_user(row, name)
            elif kind == "history":
                self.fail(
                    row, "user", f"{name!r} already has a history or a request; its history must come first, once"
                )
            index[row] = known
        return index, np.array([kind == "request" for kind in kinds], dtype=np.bool_)

    def add_user(self, row: int, name: str | None) -> int:
        if name is None or not 1 <= len(name.encode()) <= MAX_USER_ID_BYTES:
            self.fail(row, "user", f"needs 1 to {MAX_USER_ID_BYTES} bytes")
        if len(self.users) >= self.limits.users:
            self.fail(row, "user", f"more than {self.limits.users} users")
        self.users[name] = len(self.users)
        return len(self.users) - 1

    def take_histories(self, table: Any, rows: Ints, user: SmallInts) -> None:
        lengths, items = self.lists(table, rows, "items")
        time_lengths, t_ms = self.lists(table, rows, "times")
        self.refuse(rows, lengths > self.limits.history, "items", f"above the limit of {self.limits.history}")
        self.refuse(rows, time_lengths != lengths, "times", "has another length than items")
        row_of = np.repeat(rows, lengths)
        late = (np.diff(t_ms, prepend=0) < 0) & (np.diff(row_of, prepend=-1) == 0) | (t_ms < 0)
        self.refuse(row_of, late, "times", "negative or before the previous one")
        some = lengths > 0
        lasts = t_ms[np.cumsum(lengths)[some] - 1]
        self.last_ms.update(zip(user[some].tolist(), lasts.tolist(), strict=True))
        actions = self.actions(table, rows, lengths)
        self.keep(owner=user, history_lengths=lengths, history_items=items, history_t_ms=t_ms, history_actions=actions)

    def take_requests(self, table: Any, rows: Ints, user: SmallInts) -> None:
        self.requests += len(rows)
        if self.requests > self.limits.requests:
            self.fail(int(rows[-1]), "rows", f"more than {self.limits.requests} requests")
        t_ms = table["t_ms"]
        if t_ms.null_count:
            self.fail(int(rows[int(np.argmax(t_ms.is_null().to_numpy()))]), "t_ms", "is required")
        times = t_ms.to_numpy()
        self.refuse(rows, np.diff(times, prepend=self.previous_ms) < 0, "t_ms", "before the previous request's")
        last = np.array([self.last_ms.get(index, -1) for index in user.tolist()])
        self.refuse(rows, times < last, "t_ms", "before the user's last history item")
        cand_lengths, cand = self.lists(table, rows, "cand")
        clicked_lengths, clicked = self.lists(table, rows, "clicked")
        for field, lengths in (("cand", cand_lengths), ("clicked", clicked_lengths)):
            self.refuse(rows, lengths > self.limits.candidates, field, f"above the limit of {self.limits.candidates}")
        self.refuse(rows, cand_lengths == 0, "cand", "needs at least one candidate")
        self.previous_ms = int(times[-1])
        self.keep(
            user=user, t_ms=times, session=table["session"].fill_null(0).to_numpy(),
            cand_lengths=cand_lengths, cand_items=cand, clicked_lengths=clicked_lengths, clicked_items=clicked,
            clicked_actions=self.actions(table, rows, clicked_lengths),
        )  # fmt: skip

    def lists(self, table: Any, rows: Ints, name: str) -> tuple[Ints, npt.NDArray[Any]]:
        """(length of each row's list, all values)."""
        column = table[name].combine_chunks()
        if column.null_count:
            self.fail(int(rows[int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))]), name, "is required")
        values = column.flatten()
        lengths = column.value_lengths().to_numpy().astype(np.int64)
        if values.null_count:
            self.refuse(np.repeat(rows, lengths), values.is_null().to_numpy(zero_copy_only=False), name, "holds a null")
        return lengths, values.to_numpy()

    def actions(self, table: Any, rows: Ints, counts: Ints) -> SmallInts:
        column = table["actions"].combine_chunks()
        missing = column.is_null().to_numpy(zero_copy_only=False)
        given = np.flatnonzero(~missing)
        actions = np.full(int(counts.sum()), CLICK, dtype=np.int32)
        if len(given):
            lengths, values = self.lists(table.take(given), rows[given], "actions")
            self.refuse(rows[given], lengths != counts[given], "actions", "has another length than its items")
            self.refuse(np.repeat(rows[given], lengths), values < 0, "actions", "is negative")
            actions[np.repeat(~missing, counts)] = values
        return actions

    def keep(self, **columns: npt.NDArray[Any]) -> None:
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column)

    def trace(self, meta: TraceMeta) -> Trace:
        def whole(name: str, dtype: type = np.int64) -> npt.NDArray[Any]:
            return np.concatenate([np.empty(0, dtype), *self.columns.get(name, [])]).astype(dtype)

        history_lengths = np.zeros(len(self.users), dtype=np.int64)
        history_lengths[whole("owner")] = whole("history_lengths")
        return Trace(
            user_ids=tuple(self.users),
            history_offsets=offsets_of(history_lengths),
            history_items=whole("history_items"), history_t_ms=whole("history_t_ms"),
            history_actions=whole("history_actions", np.int32),
            user=whole("user", np.int32), t_ms=whole("t_ms"), session=whole("session"),
            cand_offsets=offsets_of(whole("cand_lengths")), cand_items=whole("cand_items"),
            clicked_offsets=offsets_of(whole("clicked_lengths")), clicked_items=whole("clicked_items"),
            clicked_actions=whole("clicked_actions", np.int32), meta=meta,
        )  # fmt: skip
