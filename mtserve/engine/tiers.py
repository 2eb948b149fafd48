"""The two tiers as the engine sees them: where ids (the index) and bytes (the mover) meet.

Every begin of the index is matched by exactly one end: a batch's when its step is over, a
copy's when the mover reports it finished. Whatever lies between is found by nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.cache.index import Copy, Load, Presence, TieredIndex
from mtserve.config import EngineConfig
from mtserve.engine.job import Job
from mtserve.engine.scheduler import Slot
from mtserve.engine.sequence import UserSequence
from mtserve.engine.tier_counts import TierCounts
from mtserve.engine.transfers import Transfers
from mtserve.engine.window import open_window
from mtserve.engine.write_back import WriteBack
from mtserve.metrics import Metrics
from mtserve.transfer.mover import LOAD, STORE, Arrivals, Mover
from mtserve.types import Clock
from mtserve.units import parse_capacity

# Times one request asks for its prefix from the host; evicted again before its batch, it is encoded.
MAX_LOADS = 2


@dataclass(frozen=True)
class Reservation:
    """A batch's pages. int32; row b is slot b: `cached` and `stored` [B], `page_table` [B, W].

    The page table is read while the batch is planned, and belongs to the next one after that.
    `loads`: tickets of loads that bring some of the cached tokens while the batch is already under way, `arrivals`
    what the batch waits for; None where there are none.
    """

    ticket: int
    cached: npt.NDArray[np.int32]
    stored: npt.NDArray[np.int32]
    page_table: npt.NDArray[np.int32]
    pages: int
    loads: tuple[int, ...] = ()
    arrivals: Arrivals | None = None


class Tiers:
    """Onload, write-back and reservation of pages. Owned by the engine's loop."""

    def __init__(
        self, index: TieredIndex, mover: Mover, config: EngineConfig, metrics: Metrics, clock: Clock, max_prefix: int
    ) -> None:
        self.index = index
        self.mover = mover
        self._metrics = metrics
        self._page_bytes = mover.pool[:1].nbytes
        self._poison = config.poison_pages
        slots = config.max_batch_requests
        self._cached = np.zeros(slots, dtype=np.int32)
        self._stored = np.zeros(slots, dtype=np.int32)
        self._page_table = np.full((slots, -(-max_prefix // config.page_tokens)), -1, dtype=np.int32)
        self._transfers = Transfers(metrics, clock, self._page_bytes)
        self._write_back = WriteBack(index, clock, config.write_back_idle_ms / 1000)
        self._deferred = False  # whether write-backs wait for the link
        self._failed_loads: set[str] = set()
        self._to_load: list[Load] = []  # decided in this step
        self._always_load = config.restore == "load"
        self._token_s, self._tokens_ahead = 0.0, 0  # seconds a token; tokens to encode for the jobs ahead of one
        self._reserved_pages = 0  # of the batch under way
        self._window: dict[str, int] = {}  # users whose turn is near enough to load them -> pages kept for each
        self._held: dict[int, tuple[str, int]] = {}  # ticket of a copy under way -> user, device pages it holds fast
        self._loading: dict[str, int] = {}  # user -> ticket of the load under way
        pool_bytes = len(mover.pool) * self._page_bytes
        self._queue_pages = max(
            1, parse_capacity(config.write_back_queue, of=pool_bytes, field="write_back_queue") // self._page_bytes
        )
        # What the index says of the first waiting jobs: from `onload` to the batch that follows, or to a load's begin or end.
        self._surveyed: dict[Job, Presence] = {}
        self._page_tokens = config.page_tokens
        self._counts = TierCounts(index, metrics, self._page_bytes)
        self._counts.update()
        self._has_host = len(mover.arena) > 0

    def cached(self, job: Job) -> int | None:
        """Prefix tokens of `job` on the device; None while it should wait for room, or for its states to come."""
        if not self._near(job):
            return None
        present = self._presence(job)
        if present.in_batch or (present.loading and not self.mover.near(self._loading[job.user_id])):
            return None
        tokens = max(present.gpu_tokens, present.arriving_tokens)
        if present.host_tokens > tokens and job.loads < MAX_LOADS:
            return None
        return tokens

    def _near(self, job: Job) -> bool:
        return -(-len(job.sequence.chain) // self._page_tokens) <= self._window.get(job.user_id, 0)

    def _presence(self, job: Job) -> Presence:
        known = self._surveyed.get(job)
        return known if known is not None else self.index.survey([job.user_id], [job.sequence.chain])[0]

    def onload(self, jobs: Sequence[Job], token_s: float) -> None:
        """Start bringing what the host holds of these jobs' prefixes and the device does not.

        Only the first users whose prefixes the device can hold together, beside the batch under way: more would
        evict one another. `token_s`: seconds in which the device encodes a token, 0 where that is not known.
        """
        self._open_window(jobs)
        self._token_s, self._tokens_ahead = token_s, 0
        near = [job for job in jobs if self._near(job)]
        found = self.index.survey([job.user_id for job in near], [job.sequence.chain for job in near])
        self._surveyed = dict(zip(near, found, strict=True))
        for job in near:
            if self._failed_loads and job.user_id in self._failed_loads:
                job.loads, job.loaded_from = MAX_LOADS, -1  # the copy failed: encode instead
            present = self._presence(job)
            if present.loading or present.host_tokens > present.gpu_tokens:
                self._bring(job, present)
            comes = 0 < job.loads < MAX_LOADS
            self._tokens_ahead += job.prefix - (present.host_tokens if comes else present.gpu_tokens)
            self._tokens_ahead += len(job.candidates)
        self._failed_loads.clear()
        if self._to_load:
            self._submit(LOAD, self._to_load)
            self._to_load = []

    def _submit(self, kind: str, copies: Sequence[Copy]) -> None:
        self._transfers.began(kind, copies)
        for copy in copies:
            self._held[copy.ticket] = (copy.user, -(-copy.tokens // self._page_tokens))
            if kind == LOAD:
                self._loading[copy.user] = copy.ticket
        self.mover.submit(kind, copies)

    def _bring(self, job: Job, present: Presence) -> None:
        if present.in_batch:
            return  # what that batch brings is not known yet
        if job.loads >= MAX_LOADS or job.future.cancelled():
            return
        if present.loading:
            self._share_load(job, present.gpu_tokens)
        elif self._loads_sooner(job, present):
            self._begin_load(job, present.gpu_tokens)
        else:
            job.loads = MAX_LOADS
            self._metrics.count("loads_declined_total")

    def _loads_sooner(self, job: Job, present: Presence) -> bool:
        """Whether the link, after all that it has to bring, is expected to be done before the device could have encoded
        what waits ahead of the job and then its prefix.
        """
        if self._always_load or not self._token_s:
            return True
        first, last = present.gpu_tokens // self._page_tokens, -(-present.host_tokens // self._page_tokens)
        decided = sum(len(load.gpu_pages) for load in self._to_load) + last - first
        load_s = self.mover.load_s(self._transfers.bytes(LOAD) + decided * self._page_bytes)
        return load_s <= self._token_s * (self._tokens_ahead + job.prefix - present.gpu_tokens + len(job.candidates))

    def _open_window(self, jobs: Sequence[Job]) -> None:
        room = len(self.mover.pool) - self._reserved_pages
        held = dict(self._held.values())
        window = open_window(jobs, room, self._page_tokens, held, idle=not self._reserved_pages)
        if any(pages > self._window.get(user_id, 0) for user_id, pages in window.items()):
            # All of them, the first of them last: what others used since goes first, then whose turn comes last.
            self.index.touch(list(reversed(window)))
        self._window = window

    def _begin_load(self, job: Job, gpu_tokens: int) -> None:
        load = self.index.begin_load(job.user_id, job.sequence.chain)
        if load is None:
            if not self._transfers and not self._to_load:
                job.loads = MAX_LOADS  # no copy will end and make room: encode
            return
        self._surveyed.clear()  # the load may have evicted others
        self._note_returns()
        self._poison_freed()
        job.loads += 1
        job.loaded_from = gpu_tokens if job.loaded_from < 0 else min(job.loaded_from, gpu_tokens)
        self._to_load.append(load)

    def _share_load(self, job: Job, gpu_tokens: int) -> None:
        """A second request of a user whose load is under way waits for the same one."""
        if job.loads == 0:
            job.loads, job.loaded_from = 1, gpu_tokens

    def _note_returns(self) -> None:
        self._metrics.observe_many("return_seconds", self.index.drain_returns())

    def finish(self) -> int:
        """Publish the copies that have ended, the failed ones not; returns how many ended."""
        finished = self.mover.poll()
        if not finished:
            return 0
        self._surveyed.clear()
        self._failed_loads |= self._transfers.ended(finished)
        for copy in finished:
            end = self.index.end_load if copy.kind == LOAD else self.index.end_store
            end(copy.ticket, copy.error is None)
            user, _ = self._held.pop(copy.ticket)
            if self._loading.get(user) == copy.ticket:
                del self._loading[user]
        self._poison_freed()
        return len(finished)

    def reserve(self, slots: Sequence[Slot]) -> Reservation:
        """Pin what the slots' prefixes have on the device and find pages for what will be encoded."""
        self._surveyed.clear()
        count = len(slots)
        cached, stored, table = self._cached[:count], self._stored[:count], self._page_table[:count]
        users = [slot.user_id for slot in slots]
        chains = [slot.sequence.chain[: slot.encode_to] if slot.partial else slot.sequence.chain for slot in slots]
        ticket = self.index.begin_batch(users, chains, cached, stored, table)
        self._note_returns()
        self._poison_freed()
        pages = int((-(-stored // self._page_tokens)).sum())
        self._reserved_pages += pages
        loads = tuple(self._loading[user] for user in users if user in self._loading)
        arrivals = self.mover.arrivals(loads) if loads else None
        return Reservation(ticket, cached.copy(), stored.copy(), table, pages, loads, arrivals)

    def release(self, reservation: Reservation, slots: Sequence[Slot], success: bool) -> list[str]:
        """Make the batch's new states findable, or give its new pages back.

        Returns the users whose states and scores are void, because a load under the batch failed.
        """
        if success and any(ticket in self._held for ticket in reservation.loads):
            assert reservation.arrivals is not None
            reservation.arrivals.wait()
            self.finish()  # the loads first: what the batch made lies behind what they brought
        spoiled = self.index.end_batch(reservation.ticket, success)
        self._reserved_pages -= reservation.pages
        if success and self._has_host:
            self._write_back.grew([slot.user_id for slot in slots])
        self._poison_freed()
        self._counts.update()
        return spoiled

    def write_back(self) -> None:
        """Start copying to the host what it does not have yet, as far as the link's queue has room."""
        if not len(self._write_back):
            return
        # Half of the host tier at most: the pages of copies under way cannot make room for others.
        most = min(self._queue_pages, -(-self._counts.host_pages // 2))
        stores, deferred = self._write_back.begin(most - self._transfers.bytes(STORE) // self._page_bytes)
        self._metrics.set("unsaved_users", len(self._write_back))
        if deferred and not self._deferred:
            self._metrics.count("write_backs_deferred_total")
        self._deferred = deferred
        if stores:
            self._poison_freed()
            self._submit(STORE, stores)

    def holds(self, sequence: UserSequence) -> bool:
        """Whether any state of `sequence` is in any tier."""
        match = self.index.lookup(sequence.user_id, sequence.chain)
        return match.gpu_tokens > 0 or match.host_tokens > 0

    def invalidate(self, user_id: str | None) -> int:
        """Forget the states of one user or of all; copies under way publish nothing. Returns users forgotten."""
        forgotten = self.index.invalidate_all() if user_id is None else int(self.index.invalidate(user_id))
        gone = list(self._loading) if user_id is None else [user_id]
        for user in gone:
            self._loading.pop(user, None)  # what its load brings belongs to no later batch
        self._poison_freed()
        return forgotten

    def busy(self) -> bool:
        """Whether copies are under way or should start now."""
        return len(self._transfers) > 0 or self.due_in() <= 0

    def due_in(self) -> float:
        """Seconds until the next write-back is to start; infinity when none is."""
        return self._write_back.due_in()

    def settle(self) -> None:
        """Block until every copy has ended, and publish them."""
        self.mover.wait()
        self.finish()

    def check(self) -> None:
        """Raise CorruptState or fail an assertion when ids, copies or counts disagree."""
        self.index.check()
        stats = self.index.stats()
        assert stats.loads_in_flight == self._transfers.under_way(LOAD)
        assert stats.stores_in_flight == self._transfers.under_way(STORE)
        assert self.mover.pending() == len(self._transfers) == len(self._held)
        self._transfers.check()

    def grow_host(self, pages: int) -> None:
        """So many more pages of the arena can be copied to and from."""
        self.index.grow_host(pages)
        self._write_back.host_grew()
        self._counts.update()

    def stats(self) -> dict[str, Any]:
        """Pages and bytes of each tier, JSON-able."""
        return self._counts.facts()

    def transfers(self) -> dict[str, Any]:
        """Bytes, speed and failures of the copies each way, JSON-able."""
        return self._transfers.stats()

    def _poison_freed(self) -> None:
        """Fill freed pages with NaN: whoever reads one before it is written again shows at once."""
        if not self._poison:
            return
        freed = self.index.drain_freed("gpu")
        if len(freed):
            self.mover.poison(freed)
        freed = self.index.drain_freed("host")
        if len(freed):
            self.mover.arena[freed.astype(np.int64)] = float("nan")
