"""The storage engine: SQLite with a write-ahead log that is synced at each commit."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mtserve.errors import (
    CorruptState,
    FailedPrecondition,
    InvalidArgument,
    MtserveError,
    ResourceExhausted,
    Unavailable,
)
from mtserve.history.span import Span
from mtserve.history.storage import Blob, Reader, Record, Writer

PAGE_BYTES = 4096
CACHE_KIB = 8192  # per connection
LOG_PAGES = 4096  # of the write-ahead log before a commit also moves it into the database
IDLE_READERS = 8
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS users (
    number INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE,
    first INTEGER NOT NULL, position INTEGER NOT NULL, floor_ms INTEGER NOT NULL, last_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS blobs (key INTEGER PRIMARY KEY, crc INTEGER NOT NULL, bytes BLOB NOT NULL);
"""
_COLUMNS = "number, first, position, floor_ms, last_ms"


def _key(user: int, number: int) -> int:
    """A user's blobs are neighbours, and one 64-bit rowid finds each."""
    if user >= 1 << 31 or number >= 1 << 32:
        raise ResourceExhausted("2^31 users or 2^32 segments of a user are used up", field="history")
    return user << 32 | number


def _record(row: tuple[int, int, int, int, int]) -> Record:
    return Record(row[0], Span(*row[1:]))


class _View:
    """A transaction on one connection; both a Reader and a Writer."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def user(self, name: bytes) -> Record | None:
        row = self._connection.execute(f"SELECT {_COLUMNS} FROM users WHERE name = ?", (name,)).fetchone()
        return None if row is None else _record(row)

    def blobs(self, user: int, low: int, high: int) -> list[tuple[int, int, bytes]]:
        return self._connection.execute(
            "SELECT key & 4294967295, crc, CAST(bytes AS BLOB) FROM blobs WHERE key >= ? AND key < ? ORDER BY key",
            (_key(user, low), _key(user, 0) + high),
        ).fetchall()

    def users_after(self, name: bytes, limit: int) -> list[tuple[bytes, Record]]:
        rows = self._connection.execute(
            f"SELECT name, {_COLUMNS} FROM users WHERE name > ? ORDER BY name LIMIT ?", (name, limit)
        ).fetchall()
        return [(row[0], _record(row[1:])) for row in rows]

    def count(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM users").fetchone()[0])

    def next_number(self) -> int:
        return int(self._connection.execute("SELECT coalesce(max(number), 0) + 1 FROM users").fetchone()[0])

    def save_users(self, users: Iterable[tuple[bytes, Record]]) -> None:
        self._connection.executemany(
            "INSERT INTO users (number, name, first, position, floor_ms, last_ms) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (number) DO UPDATE SET first = excluded.first, position = excluded.position, "
            "floor_ms = excluded.floor_ms, last_ms = excluded.last_ms",
            (
                (record.number, name, span.first, span.position, span.floor_ms, span.last_ms)
                for name, record in users
                for span in (record.span,)
            ),
        )

    def save_blobs(self, blobs: Iterable[Blob]) -> None:
        self._connection.executemany(
            "REPLACE INTO blobs VALUES (?, ?, ?)",
            ((_key(user, number), crc, data) for user, number, crc, data in blobs),
        )

    def drop_blobs(self, user: int, low: int, high: int) -> None:
        self._connection.execute(
            "DELETE FROM blobs WHERE key >= ? AND key < ?", (_key(user, low), _key(user, 0) + high)
        )

    def drop_user(self, name: bytes) -> None:
        self._connection.execute("DELETE FROM users WHERE name = ?", (name,))


class SqliteStorage:
    """`Storage` in one folder: the database, its log, and a lock file that one process holds."""

    def __init__(self, folder: str | Path, *, page_bytes: int = PAGE_BYTES) -> None:
        """`page_bytes` holds for a new database; an old one keeps its own."""
        self._folder = Path(folder)
        self._page_bytes = page_bytes
        self._lock_file = _lock(self._folder)
        self._mutex = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        try:
            with _translated():
                self._writer = self._connect()
                self._writer.executescript(_TABLES)
            _sync_folder(self._folder)
            _sync_folder(self._folder.parent)
        except BaseException:
            os.close(self._lock_file)
            raise

    def claim(self, facts: dict[str, str]) -> dict[str, str]:
        with _translated(), _transaction(self._writer, "BEGIN IMMEDIATE"):
            known = dict(self._writer.execute("SELECT name, value FROM facts").fetchall())
            if not known:
                self._writer.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        return known or facts

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        with _translated():
            connection = self._borrow()
            try:
                with _transaction(connection, "BEGIN"):
                    yield _View(connection)
            finally:
                self._give_back(connection)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        with _translated(), _transaction(self._writer, "BEGIN IMMEDIATE"):
            yield _View(self._writer)

    def check(self) -> None:
        with _translated():
            connection = self._borrow()
            try:
                verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
                orphans = connection.execute(
                    "SELECT count(*) FROM blobs WHERE key >> 32 NOT IN (SELECT number FROM users)"
                ).fetchone()[0]
            finally:
                self._give_back(connection)
        if verdict != "ok":
            raise CorruptState(f"the database does not verify: {verdict}", field="history")
        if orphans:
            raise CorruptState(f"{orphans} blobs belong to no user", field="history")

    def close(self) -> None:
        """Readers under way finish on their own connections."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in (*idle, self._writer):
            connection.close()
        os.close(self._lock_file)

    def _borrow(self) -> sqlite3.Connection:
        with self._mutex:
            if self._closed:
                raise Unavailable("the history store is closed")
            if self._idle:
                return self._idle.pop()
        return self._connect()

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._mutex:
            if not self._closed and len(self._idle) < IDLE_READERS:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._folder / "history.sqlite", isolation_level=None, check_same_thread=False, timeout=10
        )
        connection.execute(f"PRAGMA page_size = {self._page_bytes}")
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            connection.close()
            raise FailedPrecondition(f"{self._folder} is on a file system without shared memory", field="path")
        connection.execute("PRAGMA synchronous = FULL")  # NORMAL would lose acknowledged appends at a power cut
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        return connection


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _lock(folder: Path) -> int:
    """Create `folder` and take its lock; returns the file descriptor that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InvalidArgument(f"{folder} cannot be used: {error.strerror}", field="path") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise FailedPrecondition(f"{folder} is open in another store or process", field="path") from None
    return descriptor


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, as an fsync of the files alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _typed(error) from error


def _typed(error: sqlite3.Error) -> MtserveError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted("the disk is full", field="history")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return CorruptState(f"the database does not verify: {error}", field="history")
    return Unavailable(f"the database failed: {error}", field="history")
