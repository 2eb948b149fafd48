"""One writing transaction over users and their segments; what changed goes out once, at `flush`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from mtserve.errors import CorruptState
from mtserve.history.span import Span, no_rows, unknown
from mtserve.history.storage import Blob, Reader, Record, Writer
from mtserve.history.store import Append
from mtserve.types import Rows

FEATURES = 0  # blob number of a user's features; segment s is blob 1 + s


@dataclass(frozen=True)
class Layout:
    """Segment s of a user holds the rows [s * segment_rows, (s + 1) * segment_rows), as far as they exist."""

    dtype: np.dtype[np.void]
    segment_rows: int

    def blob(self, position: int) -> int:
        """The blob that row `position` is in."""
        return 1 + position // self.segment_rows

    def end(self, position: int) -> int:
        """One past the last blob of a history that ends at `position`."""
        return 1 + -(-position // self.segment_rows)

    def last_ms(self, data: bytes) -> int:
        """The time of the last whole row in `data`."""
        return int(np.frombuffer(data[-self.dtype.itemsize :], self.dtype)["time_ms"][0])


def checksum(user: int, number: int, data: bytes) -> int:
    """CRC-32 of a blob and of whose it is, so that bytes in the wrong place do not verify either."""
    return zlib.crc32(data, (user * 0x9E3779B1 + number) & 0xFFFFFFFF)


def read_blobs(reader: Reader, name: bytes, user: int, low: int, high: int) -> bytes:
    """The bytes of blobs [low, high), joined. Raises CorruptState when one is missing or does not verify."""
    found = reader.blobs(user, low, high)
    if [number for number, _, _ in found] != list(range(low, high)):
        raise CorruptState(f"user {name.decode()!r} misses segments of {low} to {high}", field="history")
    for number, crc, data in found:
        if checksum(user, number, data) != crc:
            raise CorruptState(f"user {name.decode()!r} has a segment {number} that does not verify", field="history")
    return b"".join([data for _, _, data in found])


class Transaction:
    """The changes of one group. Each method checks before it changes anything, so one that raises left no trace."""

    def __init__(self, writer: Writer, layout: Layout) -> None:
        self._writer = writer
        self._layout = layout
        self._row_bytes = layout.dtype.itemsize
        self._records: dict[bytes, Record] = {}  # as they will be, once flushed
        self._tails: dict[bytes, bytes] = {}  # bytes of the last, unfinished segment
        self._blobs: dict[tuple[int, int], bytes] = {}
        self._next = 0

    def append(self, append: Append) -> int:
        name = append.user_id.encode()
        record = self._find(name)
        if record is None and not len(append.behaviours):
            raise no_rows(append.user_id)
        span = Span() if record is None else record.span
        span.admit(append.behaviours, append.position)
        tail = b"" if record is None else self._tail(name, record)
        return self._extend(name, record or self._create(name), tail, append.behaviours)

    def put(self, name: bytes, features: Rows | None, history: Rows | None) -> int:
        record = self._find(name) or self._create(name)
        self._records[name] = record
        if history is not None:
            self.flush()
            self._writer.drop_blobs(record.number, 1 + record.span.first // self._layout.segment_rows, 1 << 32)
            record = Record(record.number, Span())
            self._extend(name, record, b"", history)
        if features is not None:
            self._blobs[record.number, FEATURES] = features.tobytes()
        return self._records[name].span.position

    def truncate(self, name: bytes, position: int) -> int:
        record = self._known(name)
        span, layout = record.span, self._layout
        span.check_cut(position)
        if position == span.position:
            return position
        self.flush()
        tail, last_ms = b"", span.floor_ms
        if position > span.first:
            low = layout.blob(position - 1)
            kept = self._read(name, record, low)[: (position - (low - 1) * layout.segment_rows) * self._row_bytes]
            last_ms = layout.last_ms(kept)
            tail = kept if position % layout.segment_rows else b""
        self._writer.drop_blobs(record.number, layout.blob(position), 1 << 32)
        self._records[name] = Record(record.number, Span(span.first, position, span.floor_ms, last_ms))
        self._keep_tail(name, record.number, layout.blob(position), tail)
        return position

    def drop_before(self, name: bytes, position: int) -> int:
        record = self._known(name)
        span, layout = record.span, self._layout
        span.check_end(position)
        first = position // layout.segment_rows * layout.segment_rows
        if first <= span.first:
            return span.first
        self.flush()
        floor_ms = layout.last_ms(self._read(name, record, layout.blob(first - 1)))
        self._writer.drop_blobs(record.number, layout.blob(span.first), layout.blob(first))
        self._records[name] = Record(record.number, Span(first, span.position, floor_ms, span.last_ms))
        return first

    def delete(self, name: bytes) -> bool:
        record = self._find(name)
        if record is None:
            return False
        self.flush()
        self._writer.drop_blobs(record.number, FEATURES, 1 << 32)
        self._writer.drop_user(name)
        self._tails.pop(name, None)
        return True

    def flush(self) -> None:
        """Hand all changes to the writer, which shows them to later reads."""
        self._writer.save_blobs([self._sealed(user, number, data) for (user, number), data in self._blobs.items()])
        self._writer.save_users(self._records.items())
        self._blobs.clear()
        self._records.clear()

    def _extend(self, name: bytes, record: Record, tail: bytes, rows: Rows) -> int:
        layout, number = self._layout, self._layout.blob(record.span.position)
        data, size = tail + rows.tobytes(), layout.segment_rows * self._row_bytes
        whole = len(data) // size * size
        for start in range(0, whole, size):
            self._blobs[record.number, number] = data[start : start + size]
            number += 1
        self._records[name] = Record(record.number, record.span.grown(rows))
        self._keep_tail(name, record.number, number, data[whole:])
        return self._records[name].span.position

    def _keep_tail(self, name: bytes, user: int, number: int, tail: bytes) -> None:
        self._tails[name] = tail
        if tail:
            self._blobs[user, number] = tail

    def _tail(self, name: bytes, record: Record) -> bytes:
        tail = self._tails.get(name)
        if tail is None:
            rows = record.span.position % self._layout.segment_rows
            tail = self._read(name, record, self._layout.blob(record.span.position)) if rows else b""
            if len(tail) != rows * self._row_bytes:
                raise CorruptState(f"user {name.decode()!r} has a last segment of another length", field="history")
        return tail

    def _read(self, name: bytes, record: Record, number: int) -> bytes:
        return read_blobs(self._writer, name, record.number, number, number + 1)

    def _find(self, name: bytes) -> Record | None:
        record = self._records.get(name)
        return record if record is not None else self._writer.user(name)

    def _known(self, name: bytes) -> Record:
        record = self._find(name)
        if record is None:
            raise unknown(name.decode())
        return record

    def _create(self, name: bytes) -> Record:
        self._next = max(self._next + 1, self._writer.next_number())
        return Record(self._next, Span())

    def _sealed(self, user: int, number: int, data: bytes) -> Blob:
        return user, number, checksum(user, number, data), data
