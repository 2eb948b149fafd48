"""Histories in plain memory: for tests, simulations, and callers that can replay their log."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mtserve.errors import CorruptState, MtserveError
from mtserve.history.span import Span, no_rows, unknown
from mtserve.history.store import Append, HistoryStore
from mtserve.model.schema import FeatureSchema
from mtserve.types import History, Rows


@dataclass
class _User:
    """`rows[:span.position - span.first]` are in use and, once handed out, never rewritten."""

    features: Rows | None
    rows: Rows
    span: Span = field(default_factory=Span)

    def used(self) -> Rows:
        return self.rows[: self.span.position - self.span.first]

    def add(self, rows: Rows) -> None:
        used = len(self.used())
        if used + len(rows) > len(self.rows):
            grown = np.zeros(max(2 * used, used + len(rows), 16), self.rows.dtype)
            grown[:used] = self.used()
            self.rows = grown
        self.rows[used : used + len(rows)] = rows
        self.span = self.span.grown(rows)


class MemoryHistory(HistoryStore):
    """A dict of arrays under one lock; nothing survives the process."""

    def __init__(self, schema: FeatureSchema, *, max_append: int = 65536) -> None:
        super().__init__(schema, max_append=max_append)
        self._lock = threading.Lock()
        self._users: dict[str, _User] = {}

    def _put_user(self, user_id: str, features: Rows | None, history: Rows | None) -> int:
        with self._lock:
            user = self._users.setdefault(user_id, self._fresh())
            if features is not None:
                user.features = _frozen(features.copy())
            if history is not None:
                user.rows, user.span = self._fresh().rows, Span()
                user.add(history)
            return user.span.position

    def _append(self, append: Append) -> int:
        with self._lock:
            return self._add(append)

    def _append_many(self, appends: Sequence[Append]) -> list[int | MtserveError]:
        results: list[int | MtserveError] = []
        with self._lock:
            for append in appends:
                try:
                    results.append(self._add(append))
                except MtserveError as error:
                    results.append(error)
        return results

    def _add(self, append: Append) -> int:
        user = self._users.get(append.user_id)
        if user is None and not len(append.behaviours):
            raise no_rows(append.user_id)
        user = user or self._fresh()
        user.span.admit(append.behaviours, append.position)
        user.add(append.behaviours)
        self._users[append.user_id] = user
        return user.span.position

    def _read(self, user_id: str, last: int | None) -> History:
        with self._lock:
            user = self._known(user_id)
            rows = user.used()
            rows = rows if last is None else rows[max(0, len(rows) - last) :]
            return History(user.features, user.span.position - len(rows), _frozen(rows))

    def _position(self, user_id: str) -> int:
        with self._lock:
            return self._known(user_id).span.position

    def _truncate(self, user_id: str, position: int) -> int:
        with self._lock:
            user = self._known(user_id)
            span = user.span
            span.check_cut(position)
            user.rows = user.rows[: position - span.first]  # full, so that the next append takes a new array
            last_ms = int(user.rows["time_ms"][-1]) if len(user.rows) else span.floor_ms
            user.span = Span(span.first, position, span.floor_ms, last_ms)
            return user.span.position

    def _drop_before(self, user_id: str, position: int) -> int:
        with self._lock:
            user = self._known(user_id)
            span = user.span
            span.check_end(position)
            dropped = position - span.first
            if dropped > 0:
                floor_ms = int(user.rows["time_ms"][dropped - 1])
                user.rows = user.used()[dropped:].copy()
                user.span = Span(position, span.position, floor_ms, span.last_ms)
            return user.span.first

    def _delete(self, user_id: str) -> bool:
        with self._lock:
            return self._users.pop(user_id, None) is not None

    def users(self) -> Iterator[str]:
        self._open()
        with self._lock:
            return iter(tuple(self._users))

    def count(self) -> int:
        self._open()
        with self._lock:
            return len(self._users)

    def check(self) -> None:
        self._open()
        with self._lock:
            for user_id, user in self._users.items():
                span, times = user.span, user.used()["time_ms"]
                if not 0 <= span.first <= span.position or len(times) != span.position - span.first:
                    raise CorruptState(f"{user_id!r} has {len(times)} rows for {span}", field="history")
                path = np.concatenate(([span.floor_ms], times, [span.last_ms]))
                if (path[1:] < path[:-1]).any() or path[-2] != path[-1]:
                    raise CorruptState(f"{user_id!r} has times that decrease or do not end at {span}", field="history")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._users.clear()

    def _known(self, user_id: str) -> _User:
        user = self._users.get(user_id)
        if user is None:
            raise unknown(user_id)
        return user

    def _fresh(self) -> _User:
        return _User(None, np.zeros(0, self.schema.behaviour_dtype))


def _frozen(rows: Rows) -> Rows:
    view = rows.view()
    view.flags.writeable = False
    return view
