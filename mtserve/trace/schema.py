"""The trace: who asked for which candidates when, and what was clicked, as columns in memory.

A request is one `Score(user, cand)` at `t_ms`; after it, the clicked items become the user's
newest behaviours, at that same `t_ms`. Histories are what each user had before the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mtserve.config import Config, option
from mtserve.errors import InvalidArgument
from mtserve.trace.csr import earlier_in_group
from mtserve.types import MAX_USER_ID_BYTES

Ints: TypeAlias = npt.NDArray[np.int64]
SmallInts: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float64]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (done, total) while something long runs."""

FORMAT = "mtserve.trace/1"
CLICK = 1
"""The action of a behaviour whose source tells no more than that it was clicked."""


@dataclass(frozen=True)
class TraceLimits(Config):
    """What a reader accepts before it allocates."""

    line_bytes: int = option(64 << 20, "longest line of a text file", low=64, high=1 << 30, unit="bytes")
    row_group_bytes: int = option(
        4 << 30, "largest row group of a Parquet file, uncompressed", low=64, high=1 << 40, unit="bytes"
    )
    candidates: int = option(65_536, "candidates of one request", low=1, high=1_000_000)
    history: int = option(1_000_000, "behaviours of one user before the trace", low=0, high=100_000_000)
    users: int = option(50_000_000, "users of a trace", low=1, high=2**31 - 1)
    requests: int = option(1_000_000_000, "requests of a trace", low=1, high=2**40)


@dataclass(frozen=True)
class TraceMeta:
    """Where a trace comes from. `changes` counts what an importer had to alter, by kind of change."""

    name: str = "trace"
    source: str = ""
    seed: int | None = None
    calibrated_synthetic: bool = False
    changes: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, int | float | str | bool] = field(default_factory=dict)


class TraceRequest(NamedTuple):
    """One request: read-only views into the trace. `cand` and `clicked`: int64; `actions`: int32, as `clicked`."""

    number: int
    user: str
    user_index: int
    t_ms: int
    session: int
    cand: Ints
    clicked: Ints
    actions: SmallInts


class TraceHistory(NamedTuple):
    """A user's behaviours before the trace, oldest first: int64, int64 and int32 views of one length."""

    items: Ints
    t_ms: Ints
    actions: SmallInts


@dataclass(frozen=True, eq=False)
class Trace:
    """A whole trace; every instance is valid, `validate` having run at construction.

    U users, H history behaviours, N requests, C candidates and K clicks in all. The rows of
    user u are history_*[history_offsets[u]:history_offsets[u + 1]], likewise for requests.
    Request times never decrease; neither do the times within one user's history, and no
    request is before its user's last history item. Arrays are read-only.
    Raises InvalidArgument naming the column at fault.
    """

    user_ids: tuple[str, ...]  # [U], distinct
    history_offsets: Ints  # [U + 1]
    history_items: Ints  # [H]
    history_t_ms: Ints  # [H] ms since the epoch
    history_actions: SmallInts  # [H]
    user: SmallInts  # [N] index into user_ids
    t_ms: Ints  # [N] ms since the epoch
    session: Ints  # [N], 0 where unknown
    cand_offsets: Ints  # [N + 1], at least one candidate each
    cand_items: Ints  # [C]
    clicked_offsets: Ints  # [N + 1]
    clicked_items: Ints  # [K]
    clicked_actions: SmallInts  # [K]
    meta: TraceMeta = field(default_factory=TraceMeta)

    def __post_init__(self) -> None:
        object.__setattr__(self, "user_ids", tuple(self.user_ids))
        for name in _DTYPES:
            column = np.asarray(getattr(self, name)).view()
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        self.validate()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        same = self.user_ids == other.user_ids and self.meta == other.meta
        return same and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _DTYPES)

    __hash__ = None  # type: ignore[assignment]

    @property
    def users(self) -> int:
        """How many users there are, those without a request included."""
        return len(self.user_ids)

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.t_ms)

    @property
    def history_lengths(self) -> Ints:
        """[U] behaviours of each user before the trace."""
        return np.diff(self.history_offsets)

    @property
    def cand_lengths(self) -> Ints:
        """[N] candidates of each request."""
        return np.diff(self.cand_offsets)

    @property
    def clicked_lengths(self) -> Ints:
        """[N] clicks of each request."""
        return np.diff(self.clicked_offsets)

    def history(self, user_index: int) -> TraceHistory:
        """The behaviours that `user_ids[user_index]` had before the trace."""
        part = slice(self.history_offsets[user_index], self.history_offsets[user_index + 1])
        return TraceHistory(self.history_items[part], self.history_t_ms[part], self.history_actions[part])

    def request(self, index: int) -> TraceRequest:
        """Request number `index`, 0 <= index < requests."""
        return next(self.iter_requests(index, index + 1))

    def iter_requests(self, start: int = 0, stop: int | None = None) -> Iterator[TraceRequest]:
        """Requests number start..stop-1 in time order. Raises InvalidArgument outside 0..requests."""
        stop = self.requests if stop is None else stop
        if not 0 <= start <= stop <= self.requests:
            raise InvalidArgument(f"{start}..{stop} is outside 0..{self.requests}", field="requests")
        for block in range(start, stop, 65_536):
            part = slice(block, min(block + 65_536, stop))
            ends = slice(block, part.stop + 1)
            cand, clicked = self.cand_offsets[ends].tolist(), self.clicked_offsets[ends].tolist()
            users, times, sessions = self.user[part].tolist(), self.t_ms[part].tolist(), self.session[part].tolist()
            for i, (u, t_ms, session) in enumerate(zip(users, times, sessions, strict=True)):
                clicks = slice(clicked[i], clicked[i + 1])
                yield TraceRequest(
                    block + i, self.user_ids[u], u, t_ms, session,
                    self.cand_items[cand[i] : cand[i + 1]], self.clicked_items[clicks], self.clicked_actions[clicks],
                )  # fmt: skip

    def prefix_lengths(self) -> Ints:
        """[N] behaviours each request's user has at that request: the history and every earlier click."""
        return earlier_in_group(self.user, self.clicked_lengths) + self.history_lengths[self.user]

    def first(self, requests: int) -> Trace:
        """The trace cut after its first `requests` requests; all users stay."""
        if not 0 <= requests <= self.requests:
            raise InvalidArgument(f"{requests} is outside 0 to {self.requests}", field="requests")
        cand, clicked = self.cand_offsets[requests], self.clicked_offsets[requests]
        return replace(
            self,
            user=self.user[:requests], t_ms=self.t_ms[:requests], session=self.session[:requests],
            cand_offsets=self.cand_offsets[: requests + 1], cand_items=self.cand_items[:cand],
            clicked_offsets=self.clicked_offsets[: requests + 1], clicked_items=self.clicked_items[:clicked],
            clicked_actions=self.clicked_actions[:clicked],
        )  # fmt: skip

    def validate(self) -> None:
        """Walk every column. Raises InvalidArgument naming the first that breaks the rules above."""
        for name, dtype in _DTYPES.items():
            column = getattr(self, name)
            if column.dtype != dtype or column.ndim != 1:
                raise InvalidArgument(f"expected {dtype} [n], got {column.dtype} {list(column.shape)}", field=name)
        self._validate_users()
        _check_offsets("history_offsets", self.history_offsets, self.users, self.history_items)
        _check_offsets("cand_offsets", self.cand_offsets, self.requests, self.cand_items)
        _check_offsets("clicked_offsets", self.clicked_offsets, self.requests, self.clicked_items)
        lengths = {"history_t_ms": self.history_items, "history_actions": self.history_items,
                   "clicked_actions": self.clicked_items, "user": self.t_ms, "session": self.t_ms}  # fmt: skip
        for name, other in lengths.items():
            if len(getattr(self, name)) != len(other):
                raise InvalidArgument(f"has {len(getattr(self, name))} rows, expected {len(other)}", field=name)
        for name in ("history_t_ms", "t_ms", "history_actions", "clicked_actions", "user"):
            _refuse(name, getattr(self, name) < 0, "is negative")
        _refuse("user", self.user >= self.users, f"is not below the {self.users} users")
        _refuse("cand_offsets", self.cand_lengths == 0, "has no candidate")
        self._validate_times()

    def _validate_users(self) -> None:
        if len(set(self.user_ids)) != len(self.user_ids):
            raise InvalidArgument("two users share an id", field="user_ids")
        for index, user in enumerate(self.user_ids):
            if not user or len(user.encode()) > MAX_USER_ID_BYTES:
                raise InvalidArgument(f"needs 1 to {MAX_USER_ID_BYTES} bytes", field=f"user_ids[{index}]")

    def _validate_times(self) -> None:
        late = np.diff(self.history_t_ms, prepend=0) < 0
        firsts = self.history_offsets[:-1]
        late[firsts[firsts < len(late)]] = False
        _refuse("history_t_ms", late, "is before the same user's previous behaviour")
        _refuse("t_ms", np.diff(self.t_ms, prepend=0) < 0, "is before the previous request")
        _refuse("t_ms", self.t_ms < self.last_history_ms()[self.user], "is before the user's last history item")

    def last_history_ms(self) -> Ints:
        """[U] time of each user's last history item, -1 without one."""
        last = np.full(self.users, -1, dtype=np.int64)
        some = self.history_lengths > 0
        last[some] = self.history_t_ms[self.history_offsets[1:][some] - 1]
        return last


_COLUMNS = (
    "history_offsets", "history_items", "history_t_ms", "history_actions", "user", "t_ms", "session",
    "cand_offsets", "cand_items", "clicked_offsets", "clicked_items", "clicked_actions",
)  # fmt: skip
_SMALL = ("history_actions", "user", "clicked_actions")
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(np.int32 if name in _SMALL else np.int64) for name in _COLUMNS}


def _refuse(name: str, wrong: npt.NDArray[np.bool_], why: str) -> None:
    if wrong.any():
        raise InvalidArgument(why, field=f"{name}[{int(np.argmax(wrong))}]")


def _check_offsets(name: str, offsets: Ints, rows: int, values: Ints) -> None:
    if len(offsets) != rows + 1 or offsets[0] != 0 or offsets[-1] != len(values):
        raise InvalidArgument(f"must run from 0 to {len(values)} in {rows + 1} steps", field=name)
    _refuse(name, np.diff(offsets) < 0, "decreases")
