"""What the embedded store asks of a storage engine: users and numbered blobs, in transactions."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from mtserve.history.span import Span

Blob = tuple[int, int, int, bytes]
"""(user number, blob number, CRC-32, bytes)"""


@dataclass(frozen=True)
class Record:
    """A user as stored: `number` names the user's blobs and is never shared by two users."""

    number: int
    span: Span


class Reader(Protocol):
    """One consistent view of the stored data."""

    def user(self, name: bytes) -> Record | None: ...

    def blobs(self, user: int, low: int, high: int) -> list[tuple[int, int, bytes]]:
        """(blob number, CRC-32, bytes) of the user's blobs low <= number < high, in order."""
        ...

    def users_after(self, name: bytes, limit: int) -> list[tuple[bytes, Record]]:
        """The next users in the order of their names' bytes."""
        ...

    def count(self) -> int: ...


class Writer(Reader, Protocol):
    """The only writing transaction; it sees its own changes."""

    def next_number(self) -> int:
        """A user number above all in use."""
        ...

    def save_users(self, users: Iterable[tuple[bytes, Record]]) -> None: ...

    def save_blobs(self, blobs: Iterable[Blob]) -> None: ...

    def drop_blobs(self, user: int, low: int, high: int) -> None:
        """Delete the user's blobs low <= number < high."""
        ...

    def drop_user(self, name: bytes) -> None: ...


class Storage(Protocol):
    """One folder, owned by one process. Readers run beside the writer and never see half a transaction."""

    def claim(self, facts: dict[str, str]) -> dict[str, str]:
        """The facts recorded when the folder was created, which are `facts` when that is now."""
        ...

    def reading(self) -> AbstractContextManager[Reader]: ...

    def writing(self) -> AbstractContextManager[Writer]:
        """Commits on leaving, durably, or rolls back when an error leaves; one at a time."""
        ...

    def check(self) -> None:
        """Verify the engine's own structures and that no blob is without its user. Raises CorruptState."""
        ...

    def close(self) -> None: ...
