"""Which waiting requests make the next batch: ready users first, cold users on a budget of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from mtserve.config import EngineConfig
from mtserve.engine.job import Job
from mtserve.engine.sequence import UserSequence
from mtserve.errors import Cancelled, DeadlineExceeded, ResourceExhausted
from mtserve.metrics import Metrics

# Batches an oversized cold user lets others go first before it gets one to itself.
PATIENCE = 4


@dataclass(eq=False, slots=True)
class Slot:
    """One user in a batch: tokens [cached, encode_to) are encoded once for all of the user's jobs.

    `encode_to` short of the prefix means a part of a cold prefix: states only, the jobs stay queued.
    `keep`: whether the states get pages; slots whose do come first in a batch.
    `restored`: the host has more than the `cached` tokens; what of that is loaded is decided as the batch begins.
    """

    sequence: UserSequence
    cached: int
    encode_to: int
    jobs: list[Job] = field(default_factory=list)
    keep: bool = True
    restored: bool = False

    @property
    def user_id(self) -> str:
        return self.sequence.user_id

    @property
    def partial(self) -> bool:
        return self.encode_to < len(self.sequence.chain)

    @property
    def delta(self) -> int:
        return self.encode_to - self.cached

    @property
    def again(self) -> bool:
        """Whether all of its jobs had batches before: parts of their prefix, or one whose load failed."""
        return all(job.begun for job in self.jobs)


class Scheduler:
    """Queues jobs and picks batches. Owned by the engine's loop; `cached` asks how much of a prefix is on the device."""

    def __init__(self, config: EngineConfig, metrics: Metrics, *, static_attention: str) -> None:
        self._config = config
        self._metrics = metrics
        self._static_attention = static_attention
        # In order of arrival, and cheap to take from anywhere.
        self._scores: dict[Job, None] = {}
        self._prefetches: dict[str, Job] = {}  # one a user; behind every score
        self._cancelled = False
        # No queued job's deadline is earlier, and none with a deadline has more candidates.
        self._first_deadline, self._most_candidates = math.inf, 0

    @property
    def scores(self) -> int:
        """Requests for scores that wait; prefetches have a queue of their own."""
        return len(self._scores)

    def __len__(self) -> int:
        return len(self._scores) + len(self._prefetches)

    def add(self, job: Job) -> None:
        """Queue `job`; of two prefetches of one user only that of the newer history stays, the other fails with Cancelled.

        Raises ResourceExhausted when the queue of its kind is full.
        """
        if job.prefetch:
            self._add_prefetch(job)
        else:
            self._check_room(len(self._scores))
            self._scores[job] = None
        if job.deadline is not None:
            self._bound(job.deadline, len(job.candidates))
        if job.future.cancelled():  # before it came here: `drop_hopeless` may have looked for it already
            self._cancelled = True

    def _add_prefetch(self, job: Job) -> None:
        older = self._prefetches.get(job.user_id)
        if older is None:
            self._check_room(len(self._prefetches))
        elif _newer(older, job) and not older.future.cancelled():
            older, job = job, older  # two appends came here in the other order
        self._prefetches[job.user_id] = job
        if older is not None:
            older.fail(Cancelled(f"a newer prefetch of user {job.user_id!r} took its place"))
            self._metrics.count("prefetches_superseded_total")

    def _check_room(self, waiting: int) -> None:
        if waiting >= self._config.max_queue:
            raise ResourceExhausted(
                f"{waiting} requests are waiting, max_queue is {self._config.max_queue}", field="queue"
            )

    def cancelled(self) -> None:
        """Tell that a queued job's future may have been cancelled; from any thread."""
        self._cancelled = True

    def jobs(self) -> Iterator[Job]:
        """Every queued job in the order in which it will be considered."""
        return chain(self._scores, self._prefetches.values())

    def head(self) -> list[Job]:
        """The jobs near enough to their batch that their onload should start."""
        return list(islice(self.jobs(), 2 * self._config.max_batch_requests))

    def clear(self) -> list[Job]:
        """Take out every job."""
        jobs = list(self.jobs())
        self._scores.clear()
        self._prefetches.clear()
        return jobs

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Queue jobs again that a batch had taken: ahead of all others, and however many wait."""
        again = list(jobs)
        self._cancelled = True  # perhaps, while they were in the batch
        self._scores = {**{job: None for job in again if not job.prefetch}, **self._scores}
        for job in again:
            if job.prefetch and job.user_id not in self._prefetches:
                self._prefetches[job.user_id] = job
            elif job.prefetch:
                job.fail(Cancelled(f"a newer prefetch of user {job.user_id!r} took its place"))
                self._metrics.count("prefetches_superseded_total")
            if job.deadline is not None:
                self._bound(job.deadline, len(job.candidates))

    def remove(self, jobs: Iterable[Job]) -> None:
        """Take out `jobs`, as far as they are queued."""
        for job in jobs:
            self._scores.pop(job, None)
            if self._prefetches.get(job.user_id) is job:
                del self._prefetches[job.user_id]

    def drop_hopeless(self, now: float, token_s: float) -> None:
        """Take out what is cancelled or cannot meet its deadline, before it costs anything.

        `token_s`: seconds a token of the best recent batch; a request takes that for its candidates at least.
        """
        if not self._cancelled and self._first_deadline > now + token_s * self._most_candidates:
            return
        self._cancelled = False  # before the walk: who is cancelled during it is found in the next one
        self.remove([job for job in self.jobs() if self._hopeless(job, now, token_s * len(job.candidates))])
        self._first_deadline, self._most_candidates = math.inf, 0
        for job in self.jobs():
            if job.deadline is not None:
                self._bound(job.deadline, len(job.candidates))

    def _bound(self, deadline: float, candidates: int) -> None:
        self._first_deadline = min(self._first_deadline, deadline)
        self._most_candidates = max(self._most_candidates, candidates)

    def _hopeless(self, job: Job, now: float, needed_s: float) -> bool:
        if job.future.cancelled():
            self._metrics.count("cancelled_total")
            return True
        if job.deadline is None or job.deadline > now + needed_s:
            return False
        waited, left = (now - job.arrived) * 1000, max(0.0, job.deadline - now) * 1000
        job.fail(
            DeadlineExceeded(
                f"after {waited:.0f} ms in the queue {left:.0f} ms are left, it takes {needed_s * 1000:.0f} ms or more",
                field="deadline",
            )
        )
        self._metrics.count("deadline_exceeded_total")
        return True

    def take(
        self,
        cached: Callable[[Job], int | None],
        spare: Callable[[Job], bool] = lambda job: False,
        restorable: Callable[[Job], int | None] = lambda job: None,
        *,
        idle: bool = True,
    ) -> list[Slot]:
        """The next batch, its jobs taken out of the queue; jobs of a partial slot stay.

        `cached(job)`: prefix tokens on the device, None while the user's states are under way. What ready jobs leave of
        the cold users' budget goes to the first that `spare` allows: they are encoded whole, without pages. Where none is
        ready, only while the device is `idle`. Then, though, first come jobs that are `restorable(job)`: prefix tokens on
        the device where the host has more, and the batch itself may decide how they come back; None for others.
        """
        batch = _Batch(self._config, self._static_attention)
        overdue = self._overdue(cached)
        for job in self.jobs() if overdue is None else [overdue]:
            if batch.full:
                break
            tokens = cached(job)
            if tokens is not None:
                batch.offer(job, min(tokens, job.prefix))
        if overdue is None and idle and batch.nothing_ready:
            for job in self.head():
                if batch.full:
                    break
                tokens = restorable(job)
                if tokens is not None:
                    batch.offer_restored(job, tokens)
        if overdue is None and batch.open_to_spare(idle):
            for job in filter(spare, self.head()):
                if batch.full:
                    break
                batch.offer_whole(job)
        slots = batch.close()
        self.remove(job for slot in slots if not slot.partial for job in slot.jobs)
        return slots

    def _overdue(self, cached: Callable[[Job], int | None]) -> Job | None:
        """The first ready job that no budget fits and that has let enough batches go first: its turn, alone.

        Not a prefetch while scores wait.
        """
        for job in self.head():
            if job.prefetch and self._scores:
                break
            if job.passed_over >= PATIENCE and cached(job) is not None:
                return job
        return None


def _newer(job: Job, other: Job) -> bool:
    return len(job.sequence.chain) > len(other.sequence.chain) and job.sequence.extends(other.sequence)


class _Batch:
    """A batch being filled under its budgets."""

    def __init__(self, config: EngineConfig, static_attention: str) -> None:
        self._config = config
        self._static_attention = static_attention
        self._slots: dict[str, Slot] = {}
        self._too_large: list[Slot] = []
        self._tokens = config.max_batch_tokens
        self._cold_tokens = config.cold_batch_tokens
        self._requests = config.max_batch_requests

    @property
    def full(self) -> bool:
        return self._requests <= 0 or self._tokens <= 0

    def offer(self, job: Job, cached: int) -> None:
        """Take `job` in as far as the budgets and the user's other jobs in the batch allow."""
        slot = self._slots.get(job.user_id)
        if slot is not None:
            self._join(slot, job)
            return
        slot = Slot(job.sequence, cached, len(job.sequence.chain), [job])
        cost = slot.encode_to - cached
        # Prefetches are many or large, and nobody waits for them: they lengthen a batch no more than cold users do.
        cold = job.prefetch or cost > self._config.cold_after
        budget = min(self._tokens, self._cold_tokens) if cold else self._tokens
        cost += len(job.candidates)
        if cost > budget:
            part = self._split(slot, budget) if cold else None
            if part is None:
                self._too_large.append(slot)
                return
            slot.encode_to = part
            cost = part - cached
        self._slots[job.user_id] = slot
        self._spend(cost, cold)

    @property
    def nothing_ready(self) -> bool:
        return not self._slots and not self._too_large

    def offer_restored(self, job: Job, cached: int) -> None:
        """Take `job` in where there is room for all of its prefix: loads of others may evict what the device has of it."""
        slot = self._slots.get(job.user_id)
        if slot is not None:
            self._join(slot, job)
            return
        slot = Slot(job.sequence, cached, len(job.sequence.chain), [job], restored=True)
        cost = slot.encode_to + len(job.candidates)
        if self._slots and (self.full or cost > self._tokens):
            return
        self._slots[job.user_id] = slot
        self._spend(cost, cold=False)

    def open_to_spare(self, idle: bool) -> bool:
        """Whether jobs that must wait may fill the batch: it runs anyway, or the device is idle and nobody is ready."""
        return bool(self._slots) or (idle and not self._too_large)

    def offer_whole(self, job: Job) -> None:
        """Take `job` in without pages, as far as the budget of cold users allows."""
        slot = self._slots.get(job.user_id)
        if slot is not None:
            self._join(slot, job)
            return
        slot = Slot(job.sequence, 0, len(job.sequence.chain), [job], keep=False)
        cost = slot.encode_to + len(job.candidates)
        # The first alone may be larger than the budget: it would fit no other batch either.
        if self._slots and (self._requests <= 0 or cost > min(self._tokens, self._cold_tokens)):
            return
        self._slots[job.user_id] = slot
        self._spend(cost, cold=True)

    def close(self) -> list[Slot]:
        """The batch. A job that fits no budget runs by itself, but only when nothing else would run."""
        if not self._slots and self._too_large:
            return self._too_large[:1]
        for slot in self._too_large:
            slot.jobs[0].passed_over += 1
        return list(self._slots.values())

    def _split(self, slot: Slot, budget: int) -> int | None:
        """How far a part of at most `budget` tokens may encode; None where the prefix must be encoded in one go.

        Rows that see only what came before them can be encoded part by part, each part cached
        for the next. With full static attention U and S see one another: they need one batch.
        """
        # One token at least is left for the batch that also brings the candidates, and counts them.
        end = min(slot.cached + budget, slot.sequence.groups.prefix - 1)
        whole = slot.sequence.groups.frozen if self._static_attention == "full" else 0
        if self._config.cache == "off" or end <= slot.cached or end < whole:
            return None
        return end

    def _join(self, slot: Slot, job: Job) -> None:
        """Add another request of a user when one history is the other's prefix, in one generation."""
        longer, shorter = job.sequence, slot.sequence
        if len(longer.chain) < len(shorter.chain):
            longer, shorter = shorter, longer
        cost = len(longer.chain) - len(slot.sequence.chain) + len(job.candidates)
        budget = min(self._tokens, self._cold_tokens) if job.prefetch else self._tokens
        if slot.partial or not longer.extends(shorter) or cost > budget:
            return
        slot.sequence = longer
        slot.encode_to = len(longer.chain)
        slot.jobs.append(job)
        self._spend(cost, cold=job.prefetch)

    def _spend(self, tokens: int, cold: bool) -> None:
        self._requests -= 1
        self._tokens -= tokens
        self._cold_tokens -= tokens if cold else 0
