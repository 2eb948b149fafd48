"""Which waiting requests make the next batch: ready users first, cold users on a budget of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from mtserve.config import EngineConfig
from mtserve.engine.queue.filling import Filling, Slot
from mtserve.engine.request.job import Job
from mtserve.errors import Cancelled, DeadlineExceeded, ResourceExhausted
from mtserve.metrics import Metrics

# Batches an oversized cold user lets others go first before it gets one to itself.
PATIENCE = 4


class Questions(NamedTuple):
    """What `take` asks of each job, as documented there."""

    cached: Callable[[Job], int | None]
    spare: Callable[[Job], bool] = lambda job: False
    restorable: Callable[[Job], int | None] = lambda job: None
    passes: Callable[[Job], tuple[int, bool] | None] = lambda job: None


class Scheduler:
    """Queues jobs and picks batches. Owned by the engine's loop; `cached` asks how much of a prefix is on the device."""

    def __init__(self, config: EngineConfig, metrics: Metrics, *, static_attention: str) -> None:
        self._config = config
        self._metrics = metrics
        self._static_attention = static_attention
        self._near = 2 * config.max_batch_requests
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
        return list(islice(self.jobs(), self._near))

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
        scores, prefetches = self._scores, self._prefetches
        for job in jobs:
            scores.pop(job, None)
            if prefetches and prefetches.get(job.user_id) is job:
                del prefetches[job.user_id]

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
        passes: Callable[[Job], tuple[int, bool] | None] = lambda job: None,
        *,
        idle: bool = True,
    ) -> list[Slot]:
        """The next batch, its jobs taken out of the queue; jobs of a partial slot stay.

        `cached(job)`: prefix tokens on the device, None while the user's states are under way. Where none is ready and the
        device is `idle`, first come jobs that are `restorable(job)`: prefix tokens on the device where the host has more,
        and the batch itself may decide how they come back; None for others. Then come jobs that `passes(job)` says should
        not wait: prefix tokens on the device, with which they join a batch, and whether what is encoded is kept; those that
        keep nothing need no room, and are a batch by themselves as ready ones are. What all these leave of the cold users'
        budget goes to the first that `spare` allows: they are encoded whole, without pages; by themselves only while the
        device is `idle`.
        """
        batch = Filling(self._config, self._static_attention)
        waiting: list[Job] = []
        head = self.head()
        overdue = self._overdue(head, cached)
        for job in self.jobs() if overdue is None else [overdue]:
            if batch.full:
                break
            tokens = cached(job)
            if tokens is not None:
                batch.offer(job, min(tokens, job.prefix))
            elif len(waiting) < self._near:
                waiting.append(job)
        if idle and batch.nothing_ready:
            self._offer_restored(batch, waiting, restorable)
        self._offer_passing(batch, waiting, passes)
        if batch.open_to_spare(idle):
            batch.offer_whole(filter(spare, waiting))
        slots = batch.close()
        if waiting:
            _count_overtaken(head, slots)
        self.remove([job for slot in slots if not slot.partial for job in slot.jobs])
        return slots

    def _offer_restored(self, batch: Filling, waiting: Sequence[Job], restorable: Callable[[Job], int | None]) -> None:
        for job in waiting:
            if batch.full:
                break
            tokens = restorable(job)
            if tokens is not None:
                batch.offer_restored(job, tokens)

    def _offer_passing(
        self, batch: Filling, waiting: Sequence[Job], passes: Callable[[Job], tuple[int, bool] | None]
    ) -> None:
        """Those that keep their states first, if there is a batch to join."""
        if batch.full or not batch.open_to_spare(True):
            return
        passing = [(job, found) for job in waiting if (found := passes(job)) is not None]
        whole = [job for job, (_, keep) in passing if not keep]
        if whole or not batch.empty:
            for job, (tokens, keep) in passing:
                if keep and not batch.full:
                    batch.offer(job, tokens)
            batch.offer_whole(whole)

    def _overdue(self, head: Sequence[Job], cached: Callable[[Job], int | None]) -> Job | None:
        """The first ready job that no budget fits and that has let enough batches go first: its turn, alone.

        Not a prefetch while scores wait.
        """
        for job in head:
            if job.passed_over >= PATIENCE and not (job.prefetch and self._scores) and cached(job) is not None:
                return job
        return None


def _count_overtaken(head: Sequence[Job], slots: Sequence[Slot]) -> None:
    taken = {job for slot in slots for job in slot.jobs}
    if not taken or taken.issuperset(head):
        return
    later = False
    for job in reversed(head):
        if job in taken:
            later = True
        elif later:
            job.overtaken += 1


def _newer(job: Job, other: Job) -> bool:
    return len(job.sequence.chain) > len(other.sequence.chain) and job.sequence.extends(other.sequence)
