"""The interface of behaviour stores, and the checks of arguments that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from mtserve.errors import InvalidArgument, MtserveError, Unavailable
from mtserve.model.schema import FeatureSchema
from mtserve.types import MAX_USER_ID_BYTES, History, Rows

MAX_APPENDS = 65536


@dataclass(frozen=True)
class Append:
    """Behaviours to add to one user; `position` is where the caller believes the first one goes, None the end."""

    user_id: str
    behaviours: Rows
    position: int | None = None


class HistoryStore(ABC):
    """Every user's features and behaviours. All methods may be called from any thread.

    A change is durable (as far as the store is) when its method returns; a method that
    raises has changed nothing. All raise Unavailable once the store is closed, and
    InvalidArgument when an argument is out of bounds.
    """

    def __init__(self, schema: FeatureSchema, *, max_append: int) -> None:
        self.schema = schema
        self.max_append = max_append
        self._closed = False

    def put_user(self, user_id: str, features: Rows | None = None, history: Rows | None = None) -> int:
        """Create or update a user and return the position.

        `features`: [1] row of `user_dtype`; None keeps those known.
        `history`: [n <= max_append] rows of `behaviour_dtype` that REPLACE the history, so that
        the position becomes n; None keeps it.
        """
        self._enter(user_id)
        if features is not None:
            self._check_features(features)
        if history is not None:
            self._check_rows(history, "history")
        return self._put_user(user_id, features, history)

    def append(self, user_id: str, behaviours: Rows, position: int | None = None) -> int:
        """Add [n <= max_append] rows of `behaviour_dtype` and return the new position.

        An unknown user is created without features, unless the append is empty (NotFound).
        Raises FailedPrecondition carrying the server's position when `position` is another
        one, and InvalidArgument when times decrease, also against the newest stored row.
        """
        append = Append(user_id, behaviours, position)
        self._check_append(append)
        return self._append(append)

    def append_many(self, appends: Sequence[Append]) -> list[int | MtserveError]:
        """Do many appends in order, all that are valid with one sync; a bad one gets its own error.

        Returns for each append, in order, what `append` would have returned or raised;
        when the storage itself fails, that is raised and nothing is stored.
        """
        self._open()
        if len(appends) > MAX_APPENDS:
            raise InvalidArgument(f"{len(appends)} is above the limit of {MAX_APPENDS}", field="appends")
        results: list[int | MtserveError] = [0] * len(appends)
        valid: list[int] = []
        for index, append in enumerate(appends):
            try:
                self._check_append(append)
                valid.append(index)
            except MtserveError as error:
                results[index] = error
        for index, result in zip(valid, self._append_many([appends[index] for index in valid]), strict=True):
            results[index] = result
        return results

    def read(self, user_id: str, last: int | None = None) -> History:
        """The user's history as it stood at one moment; `last` limits it to that many newest rows.

        The rows are read-only. Raises NotFound, and CorruptState when stored rows do not verify.
        """
        self._enter(user_id)
        if last is not None:
            _check_count("last", last)
        return self._read(user_id, None if last is None else int(last))

    def position(self, user_id: str) -> int:
        """Behaviours ever appended. Raises NotFound."""
        self._enter(user_id)
        return self._position(user_id)

    def truncate(self, user_id: str, position: int) -> int:
        """Forget the rows at and after `position`, and return it: how a history is corrected upstream.

        Raises NotFound, and FailedPrecondition when `position` is past the end or before the first kept row.
        """
        self._enter(user_id)
        _check_count("position", position)
        return self._truncate(user_id, int(position))

    def drop_before(self, user_id: str, position: int) -> int:
        """Let go of rows before `position`, by retention; returns the first row that is still kept.

        A store may keep a few more rows than asked. Raises NotFound, and FailedPrecondition past the end.
        """
        self._enter(user_id)
        _check_count("position", position)
        return self._drop_before(user_id, int(position))

    def delete(self, user_id: str) -> bool:
        """Forget the user; False when not known."""
        self._enter(user_id)
        return self._delete(user_id)

    @abstractmethod
    def users(self) -> Iterator[str]:
        """User ids in no particular order; a user put or deleted meanwhile may or may not appear."""

    @abstractmethod
    def count(self) -> int:
        """Users known."""

    @abstractmethod
    def check(self) -> None:
        """Walk everything stored. Raises CorruptState naming the user and what is wrong."""

    @abstractmethod
    def close(self) -> None:
        """Finish changes under way and let go of the files; closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def _put_user(self, user_id: str, features: Rows | None, history: Rows | None) -> int: ...

    @abstractmethod
    def _append(self, append: Append) -> int: ...

    @abstractmethod
    def _append_many(self, appends: Sequence[Append]) -> list[int | MtserveError]: ...

    @abstractmethod
    def _read(self, user_id: str, last: int | None) -> History: ...

    @abstractmethod
    def _position(self, user_id: str) -> int: ...

    @abstractmethod
    def _truncate(self, user_id: str, position: int) -> int: ...

    @abstractmethod
    def _drop_before(self, user_id: str, position: int) -> int: ...

    @abstractmethod
    def _delete(self, user_id: str) -> bool: ...

    def _open(self) -> None:
        if self._closed:
            raise Unavailable("the history store is closed")

    def _enter(self, user_id: str) -> None:
        self._open()
        check_user_id(user_id)

    def _check_append(self, append: Append) -> None:
        self._enter(append.user_id)
        self._check_rows(append.behaviours, "behaviours")
        if append.position is not None:
            _check_count("position", append.position)

    def _check_rows(self, rows: Rows, field: str) -> None:
        if not isinstance(rows, np.ndarray):
            raise InvalidArgument(f"expected rows of behaviours, got {type(rows).__name__}", field=field)
        if len(rows) > self.max_append:
            raise InvalidArgument(f"{len(rows)} behaviours; the limit is {self.max_append} at a time", field=field)
        self.schema.check_behaviours(rows, field=field)

    def _check_features(self, features: Rows) -> None:
        dtype = self.schema.user_dtype
        if not isinstance(features, np.ndarray) or features.dtype != dtype or features.shape != (1,):
            raise InvalidArgument("expected one row of this model's user features", field="features")


def check_user_id(user_id: str) -> None:
    """Raise InvalidArgument unless `user_id` is text of 1 to 256 UTF-8 bytes."""
    if not isinstance(user_id, str):
        raise InvalidArgument(f"expected text, got {type(user_id).__name__}", field="user_id")
    try:
        size = len(user_id) if user_id.isascii() else len(user_id.encode())
    except UnicodeEncodeError:
        raise InvalidArgument("is not valid Unicode", field="user_id") from None
    if not 1 <= size <= MAX_USER_ID_BYTES:
        raise InvalidArgument(f"{size} bytes of UTF-8 are outside 1 to {MAX_USER_ID_BYTES}", field="user_id")


def _check_count(field: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidArgument(f"expected an integer, got {type(value).__name__}", field=field)
    if not 0 <= value < 1 << 63:
        raise InvalidArgument(f"{value} is outside 0 to 2^63 - 1", field=field)
