"""The two tiers as the engine sees them: where ids (the index) and bytes (the mover) meet.

Every begin of the index is matched by exactly one end: a batch's when its step is over, a
copy's when the mover reports it finished. Whatever lies between is found by nobody else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mtserve.cache.index import Copy, TieredIndex
from mtserve.config import EngineConfig
from mtserve.engine.queue.filling import Slot
from mtserve.engine.queue.pace import Pace
from mtserve.engine.queue.scheduler import Questions
from mtserve.engine.request.job import Job
from mtserve.engine.request.sequence import UserSequence
from mtserve.engine.tiers.footprint import Footprint
from mtserve.engine.tiers.onload import Onload
from mtserve.engine.tiers.restoring import Restored, Restoring
from mtserve.engine.tiers.tier_counts import TierCounts
from mtserve.engine.tiers.transfers import Transfers
from mtserve.engine.tiers.write_back import WriteBack
from mtserve.metrics import Metrics
from mtserve.restore.costs import Costs
from mtserve.transfer.mover import LOAD, STORE, Arrivals, Mover, Unpacker
from mtserve.transfer.pool import poison
from mtserve.types import Clock
from mtserve.units import parse_capacity

log = logging.getLogger(__name__)


class Reservation(NamedTuple):
    """A batch's pages. int32; row b is slot b: `cached` and `stored` [B], `page_table` [B, W].

    The page table is read while the batch is planned, and belongs to the next one after that.
    `loads`: tickets of loads that bring some of the cached tokens while the batch is already under way, `arrivals`
    what the batch waits for; None where there are none. `restored`: how it brings states that only the host has.
    """

    ticket: int
    cached: npt.NDArray[np.int32]
    stored: npt.NDArray[np.int32]
    page_table: npt.NDArray[np.int32]
    pages: int
    loads: tuple[int, ...] = ()
    arrivals: Arrivals | None = None
    restored: Restored | None = None


class Tiers:
    """Onload, write-back and reservation of pages. Owned by the engine's loop."""

    def __init__(
        self,
        index: TieredIndex,
        mover: Mover,
        footprint: Footprint,
        config: EngineConfig,
        metrics: Metrics,
        clock: Clock,
        max_prefix: int,
        pace: Pace,
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
        self._timeout_s = config.copy_timeout_ms / 1000
        self._transfers = Transfers(metrics, clock, config.page_tokens, self._page_bytes, self._timeout_s)
        self._write_back = WriteBack(index, clock, config.write_back_idle_ms / 1000)
        self._deferred = False  # whether write-backs wait for the link
        self._reserved_pages = 0  # of the batch under way
        self._lost_pages = 0  # evicted before they were saved
        pool_bytes = len(mover.pool) * footprint.gpu
        self._queue_pages = max(
            1, parse_capacity(config.write_back_queue, of=pool_bytes, field="write_back_queue") // self._page_bytes
        )
        self._page_tokens = config.page_tokens
        self._onload = Onload(index, mover, self._transfers, config, metrics, pace)
        self._counts = TierCounts(index, metrics, footprint)
        self._counts.update()
        self._arena_pages = len(mover.arena)
        self._config = config
        self.restoring: Restoring | None = None  # None: batches do not decide how states come back
        self._unpackers: list[Unpacker] = []  # that were replaced, and that loads under way may still run

    @property
    def questions(self) -> Questions:
        """What the scheduler asks of the jobs that `survey` looked at."""
        return Questions(self._onload.cached, self._onload.spare, self._restorable, self._onload.passes)

    def _restorable(self, job: Job) -> int | None:
        return None if self.restoring is None else self._onload.restorable(job)

    def restore_by(self, costs: Costs, *, frozen_sees_all: bool) -> None:
        """Let batches decide how states come back, by what that is expected to cost; the rest is as in Restoring."""
        self.restoring = Restoring(
            self.index, self.mover, self._transfers, self._config, self._metrics, costs, frozen_sees_all=frozen_sees_all
        )
        self._onload.passing.know(costs, frozen_sees_all=frozen_sees_all)

    def unpack_by(self, unpacker: Unpacker) -> None:
        """What makes states of the packed pages of loads from now on."""
        if self.mover.unpacker is not None and self._transfers.under_way(LOAD):
            self._unpackers.append(self.mover.unpacker)
        self.mover.unpacker = unpacker

    def survey(self, jobs: Sequence[Job], token_s: float) -> None:
        """Look at what these jobs, the first that wait, need; `token_s`: seconds to encode a token."""
        self._onload.survey(jobs, token_s, self._reserved_pages)

    def onload(self, jobs: Sequence[Job]) -> bool:
        """Start bringing what these of the surveyed jobs need from the host; whether anything was decided."""
        loads, declined = self._onload.plan(jobs)
        if loads:
            self._note_evictions()
            self._submit(LOAD, loads)
        return bool(loads) or declined

    def _submit(self, kind: str, copies: Sequence[Copy]) -> None:
        self._transfers.began(kind, copies)
        self.mover.submit(kind, copies)

    def _note_evictions(self) -> None:
        self._metrics.observe_many("return_seconds", self.index.drain_returns())
        self._poison_freed()

    def finish(self) -> int:
        """Publish the copies that have ended, the failed ones not; returns how many ended.

        A user whose load is stuck is forgotten, so that it is encoded again in other pages; those of the load stay held,
        and should it end after all, it publishes nothing.
        """
        finished = self.mover.poll()
        if finished:
            self._onload.changed()
            self._onload.failed(self._transfers.ended(finished))
            for copy in finished if self.restoring is None else self.restoring.withhold(finished):
                end = self.index.end_load if copy.kind == LOAD else self.index.end_store
                end(copy.ticket, copy.error is None)
            if not self._transfers.under_way(LOAD):
                self._unpackers.clear()
            self._poison_freed()
        for kind, user_id in self._transfers.newly_stuck():
            log.error("a %s of user %r has not ended within copy_timeout_ms", kind, user_id)
            if kind == LOAD:
                self.invalidate(user_id)
        return len(finished)

    def reserve(self, slots: Sequence[Slot]) -> Reservation:
        """Pin what the slots' prefixes have on the device and find pages for what will be encoded and kept."""
        self._onload.changed()
        count = len(slots)
        cached, stored, table = self._cached[:count], self._stored[:count], self._page_table[:count]
        kept = [slot for slot in slots if slot.keep]
        restored = None if self.restoring is None else self._begin_restore(self.restoring, slots)
        users = [slot.user_id for slot in kept]
        chains = [slot.sequence.chain[: slot.encode_to] if slot.partial else slot.sequence.chain for slot in kept]
        again, rows = [slot.again for slot in kept], slice(len(kept))
        try:
            ticket = self.index.begin_batch(users, chains, cached[rows], stored[rows], table[rows], again)
        except Exception:
            if self.restoring is not None:
                self.restoring.end(restored, success=False)
            raise
        for slot in kept:
            for job in slot.jobs:
                job.begun = True
        cached[len(kept) :] = stored[len(kept) :] = 0
        table[len(kept) :] = -1
        self._note_evictions()
        pages = sum([-(-tokens // self._page_tokens) for tokens in stored.tolist()])
        self._reserved_pages += pages
        loads = self._transfers.loads_of(users)
        if restored is not None and restored.loads:
            arrivals = restored.arrivals
        else:
            arrivals = self.mover.arrivals(loads) if loads else None
        return Reservation(ticket, cached.copy(), stored.copy(), table, pages, loads, arrivals, restored)

    def _begin_restore(self, restoring: Restoring, slots: Sequence[Slot]) -> Restored | None:
        try:
            return restoring.begin(slots, self._poison_freed)
        except Exception:  # what the mover has of their loads is not known: they are encoded again, in other pages
            for slot in slots:
                if self._transfers.loading(slot.user_id) is not None:
                    self.invalidate(slot.user_id)
            raise

    def release(self, reservation: Reservation, slots: Sequence[Slot], success: bool) -> list[str]:
        """Make the batch's new states findable, or give its new pages back.

        Returns the users whose states and scores are void, because a load under the batch failed.
        """
        if success and self._transfers.any_open(LOAD, reservation.loads):
            assert reservation.arrivals is not None
            reservation.arrivals.wait()
            self.finish()  # the loads first: what the batch made lies behind what they brought
        if self.restoring is not None:
            self.restoring.end(reservation.restored, success=success)
        spoiled = self.index.end_batch(reservation.ticket, success)
        self._reserved_pages -= reservation.pages
        if success and self._arena_pages:
            self._write_back.grew([slot.user_id for slot in slots if slot.keep])
        self._poison_freed()
        return spoiled

    def count(self) -> None:
        """Count what the tiers hold, and save last pages sooner where they are evicted before, though the host has room."""
        stats = self._counts.update()
        if stats.unsaved_pages > self._lost_pages and stats.host.free:
            self._write_back.hurry()
        self._lost_pages = stats.unsaved_pages

    def restored(self, restored: Restored, seconds: float) -> None:
        """A batch that restored states took so long, from the decision to its landing."""
        assert self.restoring is not None
        choice, watch = restored.choice, self.restoring.watch
        watch.note(choice.predicted_s, seconds, choice.way, choice.offset_s)
        self._metrics.set("restore_prediction_error", watch.error() or 0.0)

    def write_back(self) -> None:
        """Start copying to the host what it does not have yet, as far as the link's queue has room."""
        if len(self._write_back):
            self._begin_stores()
        else:
            self._deferred = False
        self._metrics.set("unsaved_users", len(self._write_back))

    def _begin_stores(self) -> None:
        # Half of the host tier at most: the pages of copies under way cannot make room for others.
        most = min(self._queue_pages, -(-self._counts.host_pages // 2))
        room = most - self._transfers.moving_bytes(STORE) // self._page_bytes
        grows = self._counts.host_pages < self._arena_pages
        stores, deferred = self._write_back.begin(room, host_grows=grows)
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
        self._transfers.disown(user_id)
        self._write_back.forget(user_id)
        self._onload.changed()
        self._poison_freed()
        return forgotten

    def pin(self, users: Sequence[str]) -> int:
        """Evict their states later than others', as far as the budget goes; returns how many were not pinned."""
        pinned = self.index.pin(users)
        self._counts.update()
        return pinned

    def unpin(self, users: Sequence[str]) -> int:
        """Returns how many were pinned."""
        unpinned = self.index.unpin(users)
        self._counts.update()
        return unpinned

    def busy(self) -> bool:
        """Whether copies are under way or should start now."""
        return self._transfers.moving > 0 or self.due_in() <= 0

    def due_in(self) -> float:
        """Seconds until the next write-back is to start; infinity when none is."""
        return self._write_back.due_in()

    def settle(self) -> bool:
        """Block until every copy has ended, and publish them. False where one is stuck."""
        if self._transfers.any_stuck or not self.mover.wait(self._timeout_s):
            return False
        self.finish()
        return True

    def check(self) -> None:
        """Raise CorruptState or fail an assertion when ids, copies or counts disagree."""
        self.index.check()
        stats = self.index.stats()
        withheld = 0 if self.restoring is None else self.restoring.waiting()
        assert stats.loads_in_flight == self._transfers.under_way(LOAD) + withheld
        assert stats.stores_in_flight == self._transfers.under_way(STORE)
        assert self.mover.pending() == len(self._transfers)
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

    def predictions(self) -> dict[str, Any]:
        """How well the batches that restored states were predicted, as in PredictionWatch; empty where none decides."""
        return {} if self.restoring is None else self.restoring.watch.stats()

    def _poison_freed(self) -> None:
        """Fill freed pages with NaN: whoever reads one before it is written again shows at once."""
        if not self._poison:
            return
        freed = self.index.drain_freed("gpu")
        if len(freed):
            self.mover.poison(freed)
        freed = self.index.drain_freed("host")
        if len(freed):
            poison(self.mover.arena, torch.from_numpy(freed.astype(np.int64)))
