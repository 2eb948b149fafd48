"""The tiered index: which tokens of which user have valid states on the GPU and on the host.

Ids and states, never bytes. Everything that moves or computes bytes is two-phase: `begin_*`
hands out page ids and a ticket, the caller does the work, `end_*(ticket, success)` publishes it
or takes it back; what lies between is found by nobody. The rules of who owns which pages
meanwhile are the table at the top of `csrc/cache/index.h`.

Single-threaded: the engine's loop owns the index, and no method may be called from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mtserve import _core
from mtserve._core import Match, Presence
from mtserve.types import Chain, Clock

__all__ = ["Busy", "IndexStats", "Load", "Match", "Presence", "Store", "TierStats", "TieredIndex"]

PageIds = npt.NDArray[np.int32]
MAX_PAGES = 2**31 - 1


class Busy(NamedTuple):
    """The open tickets of one user."""

    loading: bool
    storing: bool
    in_batch: bool

    @property
    def any(self) -> bool:
        return self.loading or self.storing or self.in_batch


class Copy(NamedTuple):
    """A copy between the tiers: `gpu_pages[i]` and `host_pages[i]`, int32, are twins.

    It brings tokens [first_token, tokens) to the destination, which holds [0, tokens) after success.
    The pages cover tokens from `first_token // page_tokens * page_tokens` on: the destination's
    half-filled tail page, where there is one, is overwritten whole. Copy whole pages; what lies
    behind the last token of the last page has no meaning.
    """

    ticket: int
    user: str
    gpu_pages: PageIds
    host_pages: PageIds
    first_token: int
    tokens: int


C = TypeVar("C", bound=Copy)


class Load(Copy):
    """Host to GPU."""

    __slots__ = ()


class Store(Copy):
    """GPU to host."""

    __slots__ = ()


class TierStats(NamedTuple):
    """Pages of one tier: free + used + in_flight == total. Evictions count since the start."""

    total: int
    free: int
    used: int  # hold committed tokens
    in_flight: int  # held by open tickets, or by users invalidated under them
    users: int  # with committed tokens here
    evicted_pages: int
    evicted_users: int  # that lost their last page here
    pinned_users: int  # whose pages here the budget of pins covers
    pinned_pages: int  # of these users


class IndexStats(NamedTuple):
    """Every counter of the index at one moment."""

    gpu: TierStats
    host: TierStats
    users: int  # findable, those without tokens yet included
    detached: int  # invalidated, pages not yet released
    batches_in_flight: int
    loads_in_flight: int
    stores_in_flight: int
    corrections: int  # histories found to differ from what the states were computed from
    invalidated: int
    unsaved_pages: int  # evicted from the GPU since the start with tokens that the host did not have
    pinned: int  # users that are pinned, with states or without
    declined_stores: int  # that the policy refused, since the start: the user is worth less than whom it would push out


class TieredIndex(_core.Index):
    """Users' committed prefixes in two tiers of `gpu_pages` and `host_pages` pages of `page_tokens` tokens.

    Inherited from the C++ core, and as public as the rest:
    `lookup(user, chain) -> Match`: tokens of `chain`'s prefix that each tier holds; changes nothing.
    `survey(users, chains) -> [Presence]`: the same for many at once, with whether a load or a batch of the
    user is under way; a user may come more than once.
    `end_batch` returns the users of whom nothing was made findable, because a load that the batch was begun over failed.
    `end_batch | end_load | end_store(ticket, success)`: FailedPrecondition, and no change, when the
    ticket is not open (ended twice, or of another kind), or a batch succeeds before a load that it was begun over ended.
    `invalidate(user) -> bool`, `invalidate_all() -> int`: unfindable at once; pages in use are freed
    when their last ticket ends, which publishes nothing.
    `users() -> [(user, gpu_tokens, host_tokens)]`: a snapshot of everything findable.
    `set_window(users)`: the users whose turn is near, the next first, in place of those of the last call.
    `pin(users) -> int`, `unpin(users) -> int`: how many of them were not, or were, pinned. Known or not: a pin holds for
    states to come, until it is taken back, `invalidate` or not. At most 2^20 users; ResourceExhausted beyond that.
    `drain_returns() -> [float]`: seconds from an eviction of a user's GPU pages to the `begin_batch` or `begin_load`
    that wanted them again, one for each since the last call; none of users whom both tiers had forgotten.
    `unsaved_tokens(user) -> int`: tokens that the user has on the GPU and not on the host.
    `grow_host(pages)`: that many more pages in the host tier.
    `check()`: walks everything; CorruptState names the first broken invariant.

    Eviction passes by whom the window names, and pinned users as far as `pin_budget` (0 to 0.5, a share of each tier's
    pages) covers them: in the order of their last use or pin, the latest whose pages fit it together. The others are
    like anybody until they are used again, or those before them leave room. Where nobody else has pages that can be
    taken, a load or a batch takes those of covered users, used first first, then those of the window, last turn first;
    a load from later turns than its own user's alone. A store takes from neither, and finds no room.

    A store of a user whom a full host tier does not have yet asks the policy whether the user is worth more than whom it
    would push out. If not, the user has what room is free, and is not asked about again until its next request.

    A user id is 1 to 256 bytes of UTF-8, a chain uint64 [tokens] of at most 2^24; InvalidArgument otherwise.
    `policy` is one of `mtserve._core.policy_names()`. It sees a request once, when its first batch begins, whatever loads
    and windows came before, and whatever batches go on with it. `host_pages=0` turns the host tier off. `track_freed`
    makes `drain_freed` report.
    """

    def __init__(
        self,
        page_tokens: int,
        gpu_pages: int,
        host_pages: int,
        policy: str = "lru",
        clock: Clock = time.time,
        track_freed: bool = False,
        pin_budget: float = 0.1,
    ) -> None:
        super().__init__(page_tokens, gpu_pages, host_pages, policy, track_freed, pin_budget)
        self._clock = clock

    def is_busy(self, user: str) -> Busy:
        """The user's open tickets. A pure question, as `lookup` is."""
        return Busy(*self._busy(user))

    def begin_batch(
        self,
        users: Sequence[str],
        chains: Sequence[Chain],
        cached: npt.NDArray[np.int32],
        stored: npt.NDArray[np.int32],
        page_table: npt.NDArray[np.int32],
        again: Sequence[bool] = (),
    ) -> int:
        """Pin B distinct users and plan where the tokens of their chains lie; the ticket for `end_batch`.

        Written: `cached` [B], tokens whose states are there; `stored` [B], tokens that have a page,
        cached <= stored <= len(chain), so states of tokens [cached, stored) are to be written and
        those beyond find no room; `page_table` [B, W], page ids of tokens [0, stored), then -1.
        All int32, C-contiguous. Room is made by evicting tail pages of users not in flight, no more
        than needed. A history that differs from what is cached cuts the user back to what is still true.

        A load in flight counts as done: the caller's work on that user's pages waits for the load's bytes, the load
        ends before the batch, and where it fails the batch makes none of that user's states findable.
        A store in flight is no obstacle.

        `again` [B], all False where empty: the user's batch does nothing but go on with requests that earlier batches
        began, a further part of a long prefix, say. The policy is told that the states are recent, but of no other use.

        Raises InvalidArgument (a user twice, a chain longer than W pages) or FailedPrecondition (a user in another
        batch) before anything changed.
        """
        return self._begin_batch(users, chains, cached, stored, page_table, again, self._clock())

    def begin_load(self, user: str, chain: Chain) -> Load | None:
        """Plan host to GPU for what `chain` shares with the host copy; perhaps only a part for want of room.

        Where there is room, pages for the rest of the chain are held with it until the load ends, so that what the next
        batch adds lies beside it.

        None when the GPU has all of it already, the user is busy in any way, or there is no room at all.
        """
        return self.begin_loads([user], [chain])[0]

    def begin_loads(self, users: Sequence[str], chains: Sequence[Chain]) -> list[Load | None]:
        """`begin_load` of one user after the other."""
        plans = self._begin_loads(users, chains, self._clock())
        return [None if plan is None else _copy(Load, user, plan) for user, plan in zip(users, plans, strict=True)]

    def begin_store(self, user: str, tail: bool = True) -> Store | None:
        """Plan GPU to host for the tokens the host lacks; perhaps only a part for want of room.

        Without `tail` only full pages: tokens behind the last of these are left for later.
        None when there is nothing to save, a load or store of the user is open, or there is no room at all.
        A batch in flight is no obstacle: it writes only behind what is stored.
        """
        return next(iter(self.begin_stores([user], tail)[0]), None)

    def begin_stores(
        self, users: Sequence[str], tail: bool = True, pages: int = MAX_PAGES
    ) -> tuple[list[Store], Sequence[str]]:
        """`begin_store` of one user after the other until `pages` or more are planned.

        The plans, without those that are None; and the users who were not asked.
        """
        plans = self._begin_stores(users, tail, pages, self._clock())
        stores = [_copy(Store, user, plan) for user, plan in zip(users, plans, strict=False) if plan is not None]
        return stores, users[len(plans) :]

    def drain_freed(self, tier: str) -> PageIds:
        """Pages of `tier` ("gpu" or "host") freed since the last call, int32, for tests that poison them.

        A page taken again since is still listed: drain after each `begin_*`, before its work is launched.
        Empty unless `track_freed`.
        """
        return np.frombuffer(self._drain_freed(tier), np.int32)

    def stats(self) -> IndexStats:
        """A snapshot of every counter."""
        gpu, host, *rest = self._stats()
        return IndexStats(TierStats(*gpu), TierStats(*host), *rest)


def _copy(kind: type[C], user: str, plan: tuple[int, bytes, bytes, int, int]) -> C:
    ticket, gpu_pages, host_pages, first_token, tokens = plan
    return kind(
        ticket, user, np.frombuffer(gpu_pages, np.int32), np.frombuffer(host_pages, np.int32), first_token, tokens
    )
