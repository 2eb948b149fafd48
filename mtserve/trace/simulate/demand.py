"""What a trace asks of the cache: whose prefix each request needs and how long it is, without any row of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.cache.keys import digest
from mtserve.config import ModelConfig
from mtserve.errors import InvalidArgument
from mtserve.model.cut import Cuts, cut_histories
from mtserve.trace.csr import earlier_in_group
from mtserve.trace.outline import Outline
from mtserve.trace.schema import SmallInts, Trace
from mtserve.trace.simulate.pins import Pins

MAX_TOKENS = 1 << 24


@dataclass(frozen=True, eq=False)
class Demand:
    """N requests of `users` users in order of time, of one model. Arrays are read-only.

    A prefix is the user's U features, S and R. A new cut of a history is a new generation: prefixes of two generations
    have no states in common. Columns with `after` say what the history has become when the request is over and its
    clicks were appended: nothing else changes one, so they are what the user's next request finds.
    Raises InvalidArgument naming the column at fault.
    """

    users: int
    user: SmallInts  # int32 [N], below users
    t_s: npt.NDArray[np.float64]  # [N] seconds since the epoch, never decreasing
    candidates: SmallInts  # int32 [N]
    tokens: SmallInts  # int32 [N] of the prefix
    generation: SmallInts  # int32 [N] of the user: rises with every cut
    frozen: SmallInts  # int32 [N] first tokens of the prefix, U and S, that see one another; 0 where they do not
    tokens_after: SmallInts  # int32 [N]
    generation_after: SmallInts  # int32 [N]
    frozen_after: SmallInts  # int32 [N]
    keys: npt.NDArray[np.uint64] | None = (
        None  # [users] hashes of the user ids, as in an engine's index; None: of numbers
    )
    pins: Pins | None = None  # None: nobody is pinned

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            values = getattr(self, name)
            if values is None and name == "keys":
                continue
            object.__setattr__(
                self, name, _column(name, values, dtype, self.users if name == "keys" else len(self.user))
            )
        if self.pins is not None and self.pins.users.shape != (self.users,):
            raise InvalidArgument(f"expected bool [{self.users}], got {list(self.pins.users.shape)}", field="pins")
        if not 0 <= self.users < 2**31:
            raise InvalidArgument(f"{self.users} is outside 0 to 2^31 - 1", field="users")
        if self.requests and not 0 <= self.user.min() <= self.user.max() < self.users:
            raise InvalidArgument(f"has numbers outside 0 to {self.users - 1}", field="user")
        if not np.isfinite(self.t_s).all() or (np.diff(self.t_s) < 0).any():
            raise InvalidArgument("must be finite and never decrease", field="t_s")
        for name in ("candidates", "tokens", "frozen", "tokens_after", "frozen_after"):
            values = getattr(self, name)
            if self.requests and not 0 <= values.min() <= values.max() <= MAX_TOKENS:
                raise InvalidArgument(f"has numbers outside 0 to {MAX_TOKENS}", field=name)

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.user)

    def first(self, requests: int) -> Demand:
        """Its first `requests` requests; all users stay."""
        if not 0 <= requests <= self.requests:
            raise InvalidArgument(f"{requests} is outside 0 to {self.requests}", field="requests")
        counts = dict(zip(COUNTS, self.counts(slice(requests)), strict=True))
        return Demand(self.users, t_s=self.t_s[:requests], keys=self.keys, pins=self.pins, **counts)

    def counts(self, part: slice) -> list[SmallInts]:
        """The columns COUNTS of some requests, in that order."""
        return [getattr(self, name)[part] for name in COUNTS]

    def next_s(self) -> npt.NDArray[np.float64]:
        """[N] when the request's user asks next, in seconds, so that what this one leaves is of use; infinity if never."""
        order = np.argsort(self.user, kind="stable")
        here, next_one = order[:-1], order[1:]
        useful = self.user[here] == self.user[next_one]
        useful &= self.generation_after[here] == self.generation[next_one]
        times = np.full(self.requests, np.inf)
        times[here] = np.where(useful, self.t_s[next_one], np.inf)
        return times

    def working_set_pages(self, page_tokens: int, among: npt.NDArray[np.bool_] | None = None) -> int:
        """Pages that hold the states of every user who asks, after the last request, as `mtserve.trace.working_set`.

        `among`: bool [users], of these alone.
        """
        tokens = np.zeros(self.users, dtype=np.int64)
        tokens[self.user] = self.tokens_after  # of a user's requests the last is assigned last
        pages = -(-tokens // page_tokens)
        return int(pages.sum() if among is None else pages[among].sum())


COUNTS = (
    "user", "candidates", "tokens", "generation", "frozen", "tokens_after", "generation_after", "frozen_after",
)  # fmt: skip
_DTYPES: dict[str, Any] = {**dict.fromkeys(COUNTS, np.int32), "t_s": np.float64, "keys": np.uint64}


def _column(name: str, values: Any, dtype: Any, rows: int) -> npt.NDArray[Any]:
    if values.dtype != dtype or values.shape != (rows,):
        expected = f"expected {np.dtype(dtype)} [{rows}]"
        raise InvalidArgument(f"{expected}, got {values.dtype} {list(values.shape)}", field=name)
    column: npt.NDArray[Any] = np.ascontiguousarray(values).view()
    column.flags.writeable = False
    return column


def demand_of(trace: Trace | Outline, model: ModelConfig, user_tokens: int) -> Demand:
    """The demand of `trace` on a model of `user_tokens` U features."""
    positions = trace.prefix_lengths()
    before, after = cut_histories(positions, model), cut_histories(positions + trace.clicked_lengths, model)
    cut = (before.start != after.start) | (before.static_end != after.static_end)
    generation = earlier_in_group(trace.user, cut)
    return Demand(
        trace.users, trace.user, trace.t_ms / 1000, trace.cand_lengths.astype(np.int32),
        _tokens(before, user_tokens), generation.astype(np.int32), _frozen(before, model, user_tokens),
        _tokens(after, user_tokens), (generation + cut).astype(np.int32), _frozen(after, model, user_tokens),
        np.fromiter((digest(user.encode()) for user in trace.user_ids), np.uint64, trace.users),
    )  # fmt: skip


def _tokens(cuts: Cuts, user_tokens: int) -> SmallInts:
    return (user_tokens + cuts.kept).astype(np.int32)


def _frozen(cuts: Cuts, model: ModelConfig, user_tokens: int) -> SmallInts:
    if model.static_attention != "full":
        return np.zeros(len(cuts.end), dtype=np.int32)
    return (user_tokens + cuts.static_end - cuts.start).astype(np.int32)
