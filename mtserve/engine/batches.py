"""Batches from their slots to their answers: pages, plan, launch, landing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mtserve.engine.answers import Answers
from mtserve.engine.flight import Flight
from mtserve.engine.forward.batch import BatchPlan, EarlyLayers
from mtserve.engine.forward.runner import Done
from mtserve.engine.queue.filling import Slot
from mtserve.engine.queue.pace import Pace
from mtserve.engine.queue.scheduler import Scheduler
from mtserve.engine.served import Served
from mtserve.engine.stopwatch import Stopwatch
from mtserve.engine.tiers.onload import MAX_LOADS
from mtserve.engine.tiers.restoring import Restored
from mtserve.engine.tiers.tiers import Reservation, Tiers
from mtserve.metrics import Metrics
from mtserve.types import Clock

log = logging.getLogger(__name__)


class Batches:
    """Launches batches and lands them. `flight`: that under way, which its owner sets. `served` may change while none is."""

    def __init__(
        self,
        served: Served,
        scheduler: Scheduler,
        tiers: Tiers | None,
        metrics: Metrics,
        clock: Clock,
        pace: Pace,
        stopwatch: Stopwatch,
        *,
        before_answers: Callable[[Sequence[Slot]], None],
        invalidate: Callable[[str], object],
    ) -> None:
        """`before_answers(slots)`: called when the slots' new states can be found and nobody was answered yet.
        `invalidate(user_id)`: forget states that scores show to be broken.
        """
        self.served = served
        self.flight: Flight | None = None
        self._scheduler, self._tiers, self._pace, self._stopwatch = scheduler, tiers, pace, stopwatch
        self._metrics, self._clock, self._before_answers = metrics, clock, before_answers
        self._answers = Answers(metrics, clock, invalidate)

    def launch(self, slots: Sequence[Slot]) -> Flight | None:
        """Reserve, plan and start a batch; None when that failed, and its requests with it."""
        began, runner = self._clock(), self.served.runner
        reservation: Reservation | None = None
        parts = [slot for slot in slots if slot.partial]
        try:
            if self._tiers is not None and slots[0].keep:
                reservation = self._tiers.reserve(slots)
                crowded = self._crowded(slots, reservation) if parts else None
                if crowded is not None:
                    crowded.jobs[0].passed_over += 1  # still queued: considered again with the next batch
                    self._tiers.release(reservation, slots, success=False)
                    return self.launch([slot for slot in slots if slot is not crowded])
            if not slots[-1].keep:  # those that are kept come first
                self._metrics.count("spare_requests_total", sum(len(slot.jobs) for slot in slots if not slot.keep))
            early = self._start_early(slots, reservation)
            plan = self.served.planner.plan(slots, reservation, runner.room)
            # A part that found no pages was planned whole: its jobs, which `take` left queued, are answered now.
            self._scheduler.remove([job for slot in parts if not slot.partial for job in slot.jobs])
            # Nothing to encode and nothing to score: a prefetch that found all of its states.
            arrivals = None if reservation is None else reservation.arrivals
            launched = self._stopwatch.lap("planning")
            pending = runner.start(plan, arrivals, early) if plan.tokens else self._nothing()
            self._stopwatch.lap("planning" if runner.overlaps else "device")
            return Flight(slots, reservation, plan, pending, began, launched)
        except Exception as error:
            log.exception("a batch of %d users failed", len(slots))
            try:
                runner.settle()  # what it had begun may still write its pages
            finally:
                self._fail(slots, reservation, error)
            return None

    def _crowded(self, slots: Sequence[Slot], reservation: Reservation) -> Slot | None:
        """A part that found no pages and has to be encoded whole, where that is more than fits beside the others."""
        if len(slots) == 1:
            return None
        rows, crowded = 0, None
        for slot, cached, stored in zip(slots, reservation.cached.tolist(), reservation.stored.tolist(), strict=True):
            if slot.partial and stored >= slot.encode_to:
                rows += slot.encode_to - cached
                continue
            rows += len(slot.sequence.chain) - cached + slot.candidates
            if slot.partial:
                crowded = slot
        return crowded if rows > self.served.most_rows else None

    def _nothing(self) -> Done:
        """What there is to answer where nothing was scored."""
        return Done(np.empty((0, len(self.served.model.config.tasks)), dtype=np.float32))

    def _start_early(self, slots: Sequence[Slot], reservation: Reservation | None) -> EarlyLayers | None:
        """Plan and start the layers of a batch that come before those that are loaded, where there are both."""
        restored = None if reservation is None else reservation.restored
        if reservation is None or restored is None or not restored.loads or not restored.choice.first_layer:
            return None
        before = restored.early([slot.user_id for slot in slots], reservation.cached.tolist())
        plan = self.served.planner.plan(slots, reservation, self.served.runner.early_room, before)
        early = EarlyLayers(plan, restored.choice.first_layer)
        self.served.runner.start_early(early)
        return early

    def land(self) -> bool:
        """Wait for the batch under way and answer it; False when there is none."""
        flight, self.flight = self.flight, None
        if flight is None:
            return False
        try:
            self._stopwatch.lap("answers")
            logits = flight.pending.result()
            self._stopwatch.landed(flight.launched, self._stopwatch.lap("device"))
        except Exception as error:
            log.exception("a batch of %d users failed", len(flight.slots))
            self._fail(flight.slots, flight.reservation, error)
            return True
        now = self._clock()
        seconds = now - flight.began
        restored = None if flight.reservation is None else flight.reservation.restored
        # The link's time says nothing of what a token takes.
        self._pace.landed(flight.began, now, 0 if restored is not None and restored.loads else flight.plan.tokens)
        try:
            self._commit(flight.slots, flight.reservation, flight.plan, logits, seconds)
        except Exception as error:  # ours, or the device's end: the loop stops, but nobody waits for ever
            for job in [job for slot in flight.slots for job in slot.jobs]:
                job.fail(error)
            raise
        self._note_landed(flight.pending.waited(), restored, seconds)  # which nobody has to wait for
        return True

    def _note_landed(self, waited: dict[int, float], restored: Restored | None, seconds: float) -> None:
        """Count what a batch has left, and how long its layers waited for loads; hold what it took to what was predicted."""
        if waited:
            groups = [("load_wait_seconds_total", each, str(group)) for group, each in enumerate(waited.values())]
            self._metrics.count_many((("batches_over_loads_total", 1, ""), *groups))
        if self._tiers is not None:
            self._tiers.count()
            if restored is not None:
                self._tiers.restored(restored, seconds)

    def _commit(
        self,
        slots: Sequence[Slot],
        reservation: Reservation | None,
        plan: BatchPlan,
        logits: npt.NDArray[np.float32],
        seconds: float,
    ) -> None:
        """Make the new states findable and answer."""
        spoiled: list[str] = []
        if self._tiers is not None and reservation is not None:
            spoiled = self._tiers.release(reservation, slots, success=True)
        cached = [0] * len(slots) if reservation is None else reservation.cached.tolist()
        for slot, tokens in zip(slots, cached, strict=True):
            if spoiled and slot.user_id in spoiled:
                self._try_again(slot)
                continue
            for job in slot.jobs:
                job.found(tokens)
        self._before_answers([slot for slot in slots if slot.user_id not in spoiled] if spoiled else slots)
        self._answers.give(plan, logits, self.served.model.config.tasks, seconds, without=spoiled)

    def _try_again(self, slot: Slot) -> None:
        """A load failed under the batch: what it computed of this user is void."""
        for job in slot.jobs:
            job.loads, job.loaded_from = MAX_LOADS, -1  # encode instead
        if not slot.partial:  # the jobs of a part are still queued
            self._scheduler.put_back(slot.jobs)

    def _fail(self, slots: Sequence[Slot], reservation: Reservation | None, error: Exception) -> None:
        """A crashed step fails its requests and leaks no page."""
        if self._tiers is not None and reservation is not None:
            self._tiers.release(reservation, slots, success=False)
            self._tiers.count()
        jobs = [job for slot in slots for job in slot.jobs]
        self._scheduler.remove(jobs)
        for job in jobs:
            if job.fail(error):
                self._metrics.count("failed_total")
