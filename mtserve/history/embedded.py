"""Durable histories in local files: segments of behaviours over a transactional storage engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from mtserve.errors import CorruptState, FailedPrecondition, MtserveError
from mtserve.history.group import GroupCommit, Ticket
from mtserve.history.span import unknown
from mtserve.history.storage import Reader, Record, Storage
from mtserve.history.store import Append, HistoryStore
from mtserve.history.transaction import FEATURES, Layout, Transaction, read_blobs
from mtserve.model.schema import FeatureSchema
from mtserve.types import History, Rows

T = TypeVar("T")
FORMAT = "1"
SEGMENT_ROWS = 64
USERS_AT_ONCE = 1024


class EmbeddedHistory(HistoryStore):
    """Changes of many threads share a commit, and the commit's sync comes before any of them returns.

    `commits` counts the commits so far. `segment_rows` holds for a new folder; an old one keeps its own.
    """

    def __init__(
        self, schema: FeatureSchema, storage: Storage, *, max_append: int = 65536, segment_rows: int = SEGMENT_ROWS
    ) -> None:
        super().__init__(schema, max_append=max_append)
        self._storage = storage
        try:
            self._layout = self._claim(segment_rows)
        except BaseException:
            storage.close()
            raise
        self._group = GroupCommit(self._commit)
        self.commits = 0

    def _claim(self, segment_rows: int) -> Layout:
        """Record what the bytes mean in a new folder; refuse an old one where they mean something else."""
        rows = {"user": self.schema.user_dtype.descr, "behaviour": self.schema.behaviour_dtype.descr}
        facts = {"format": FORMAT, "rows": json.dumps(rows), "segment_rows": str(segment_rows)}
        known = self._storage.claim(facts)
        if known.get("format") != FORMAT:
            raise FailedPrecondition(
                f"the folder has format {known.get('format')}; this version reads {FORMAT}", field="history"
            )
        if known.get("rows") != facts["rows"]:
            raise FailedPrecondition(
                f"the folder holds rows of another schema: {known.get('rows')}, not {facts['rows']}", field="history"
            )
        size = known.get("segment_rows", "")
        if not size.isdecimal() or int(size) < 1:
            raise CorruptState(f"the folder records segments of {size!r} rows", field="history")
        return Layout(self.schema.behaviour_dtype, int(size))

    def _put_user(self, user_id: str, features: Rows | None, history: Rows | None) -> int:
        return self._change(lambda change: change.put(user_id.encode(), features, history))

    def _append(self, append: Append) -> int:
        return self._change(lambda change: change.append(append))

    def _append_many(self, appends: Sequence[Append]) -> list[int | MtserveError]:
        def append_all(change: Transaction) -> list[int | MtserveError]:
            results: list[int | MtserveError] = []
            for append in appends:
                try:
                    results.append(change.append(append))
                except MtserveError as error:
                    results.append(error)
            return results

        return self._change(append_all) if appends else []

    def _truncate(self, user_id: str, position: int) -> int:
        return self._change(lambda change: change.truncate(user_id.encode(), position))

    def _drop_before(self, user_id: str, position: int) -> int:
        return self._change(lambda change: change.drop_before(user_id.encode(), position))

    def _delete(self, user_id: str) -> bool:
        return self._change(lambda change: change.delete(user_id.encode()))

    def _read(self, user_id: str, last: int | None) -> History:
        name = user_id.encode()
        with self._storage.reading() as reader:
            record = reader.user(name)
            if record is None:
                raise unknown(user_id)
            return self._load(reader, name, record, last)

    def _position(self, user_id: str) -> int:
        with self._storage.reading() as reader:
            record = reader.user(user_id.encode())
        if record is None:
            raise unknown(user_id)
        return record.span.position

    def users(self) -> Iterator[str]:
        for name, _ in self._walk():
            yield name.decode()

    def count(self) -> int:
        self._open()
        with self._storage.reading() as reader:
            return reader.count()

    def check(self) -> None:
        self._open()
        self._storage.check()
        for name, _ in self._walk():
            with self._storage.reading() as reader:
                record = reader.user(name)
                if record is not None:
                    self._check_user(reader, name, record)

    def close(self) -> None:
        self._closed = True
        self._group.close()
        self._storage.close()

    def _change(self, change: Callable[[Transaction], T]) -> T:
        return self._group.submit(change)

    def _commit(self, tickets: list[Ticket]) -> None:
        """Commit a group; when one of them breaks it, each gets a transaction of its own."""
        try:
            self._transact(tickets)
        except Exception as error:
            if len(tickets) == 1:
                tickets[0].error = error
                return
            for ticket in tickets:
                self._commit([ticket])

    def _transact(self, tickets: list[Ticket]) -> None:
        with self._storage.writing() as writer:
            change = Transaction(writer, self._layout)
            for ticket in tickets:
                ticket.error = None
                try:
                    ticket.result = ticket.change(change)
                except MtserveError as error:  # refused before it changed anything: the others go in
                    ticket.error = error
            change.flush()
        self.commits += 1

    def _walk(self) -> Iterator[tuple[bytes, Record]]:
        name = b""
        while True:
            self._open()
            with self._storage.reading() as reader:
                found = reader.users_after(name, USERS_AT_ONCE)
            yield from found
            if len(found) < USERS_AT_ONCE:
                return
            name = found[-1][0]

    def _load(self, reader: Reader, name: bytes, record: Record, last: int | None) -> History:
        span, layout = record.span, self._layout
        first = span.first if last is None else max(span.first, span.position - last)
        low = layout.blob(first)
        data = read_blobs(reader, name, record.number, low, max(low, layout.end(span.position)))
        skipped = first - (low - 1) * layout.segment_rows
        if len(data) != (skipped + span.position - first) * layout.dtype.itemsize:
            raise CorruptState(f"user {name.decode()!r} has segments of another length", field="history")
        rows = np.frombuffer(data, layout.dtype)[skipped:]
        return History(self._features(reader, name, record), first, rows)

    def _features(self, reader: Reader, name: bytes, record: Record) -> Rows | None:
        dtype = self.schema.user_dtype
        if not reader.blobs(record.number, FEATURES, FEATURES + 1):
            return None
        data = read_blobs(reader, name, record.number, FEATURES, FEATURES + 1)
        if len(data) != dtype.itemsize:
            raise CorruptState(f"user {name.decode()!r} has features of another length", field="history")
        features = np.frombuffer(data, dtype) if data else np.zeros(1, dtype)
        features.flags.writeable = False
        return features

    def _check_user(self, reader: Reader, name: bytes, record: Record) -> None:
        span, layout, whose = record.span, self._layout, f"user {name.decode()!r}"
        if not 0 <= span.first <= span.position or span.first % layout.segment_rows:
            raise CorruptState(f"{whose} has a broken {span}", field="history")
        times = self._load(reader, name, record, None).behaviours["time_ms"]
        path = np.concatenate(([span.floor_ms], times, [span.last_ms]))
        if (path[1:] < path[:-1]).any() or path[-2] != path[-1]:
            raise CorruptState(f"{whose} has times that decrease or do not end at {span.last_ms}", field="history")
        if reader.blobs(record.number, 1, layout.blob(span.first)) or reader.blobs(
            record.number, max(layout.end(span.position), layout.blob(span.first)), 1 << 32
        ):
            raise CorruptState(f"{whose} has segments outside {span.first} to {span.position}", field="history")
