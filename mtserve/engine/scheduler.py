"""Which waiting requests make the next batch: ready users first, cold users on a budget of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mtserve.config import EngineConfig
from mtserve.engine.job import Job
from mtserve.engine.sequence import UserSequence
from mtserve.errors import DeadlineExceeded, ResourceExhausted
from mtserve.metrics import Metrics

# Batches an oversized cold user lets others go first before it gets one to itself.
PATIENCE = 4


@dataclass(eq=False)
class Slot:
    """One user in a batch: tokens [cached, encode_to) are encoded once for all of the user's jobs.

    `encode_to` short of the prefix means a part of a cold prefix: states only, the jobs stay queued.
    """

    sequence: UserSequence
    cached: int
    encode_to: int
    jobs: list[Job] = field(default_factory=list)

    @property
    def user_id(self) -> str:
        return self.sequence.user_id

    @property
    def partial(self) -> bool:
        return self.encode_to < self.sequence.groups.prefix

    @property
    def delta(self) -> int:
        return self.encode_to - self.cached


class Scheduler:
    """Queues jobs and picks batches. Owned by the engine's loop; `cached` asks how much of a prefix is on the device."""

    def __init__(self, config: EngineConfig, metrics: Metrics, *, static_attention: str) -> None:
        self._config = config
        self._metrics = metrics
        self._static_attention = static_attention
        self._scores: deque[Job] = deque()
        self._encodes: deque[Job] = deque()  # prefetches: behind every score

    @property
    def scores(self) -> int:
        """Requests for scores that wait; prefetches have a queue of their own."""
        return len(self._scores)

    def __len__(self) -> int:
        return len(self._scores) + len(self._encodes)

    def add(self, job: Job) -> None:
        """Queue `job`. Raises ResourceExhausted when the queue of its kind is full."""
        queue = self._scores if len(job.candidates) else self._encodes
        if len(queue) >= self._config.max_queue:
            raise ResourceExhausted(
                f"{len(queue)} requests are waiting, max_queue is {self._config.max_queue}", field="queue"
            )
        queue.append(job)

    def jobs(self) -> Iterator[Job]:
        """Every queued job in the order in which it will be considered."""
        yield from self._scores
        yield from self._encodes

    def head(self) -> list[Job]:
        """The jobs near enough to their batch that their onload should start."""
        window = 2 * self._config.max_batch_requests
        return [job for _, job in zip(range(window), self.jobs(), strict=False)]

    def clear(self) -> list[Job]:
        """Take out every job."""
        jobs = list(self.jobs())
        self._scores.clear()
        self._encodes.clear()
        return jobs

    def remove(self, jobs: list[Job]) -> None:
        """Take out `jobs`, as far as they are queued."""
        self._remove({id(job) for job in jobs})

    def drop_hopeless(self, now: float, token_s: float) -> None:
        """Take out what is cancelled or cannot meet its deadline, before it costs anything.

        `token_s`: seconds a token of the best recent batch; a request takes that for its candidates at least.
        """
        self.remove([job for job in self.jobs() if self._hopeless(job, now, token_s * len(job.candidates))])

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

    def take(self, cached: Callable[[Job], int | None]) -> list[Slot]:
        """The next batch, its jobs taken out of the queue; jobs of a partial slot stay.

        `cached(job)`: prefix tokens on the device, None while the user's states are under way.
        """
        batch = _Batch(self._config, self._static_attention)
        overdue = self._overdue(cached)
        for job in self.jobs() if overdue is None else [overdue]:
            if batch.full:
                break
            tokens = cached(job)
            if tokens is not None:
                batch.offer(job, min(tokens, job.prefix))
        slots = batch.close()
        self._remove({id(job) for slot in slots if not slot.partial for job in slot.jobs})
        return slots

    def _overdue(self, cached: Callable[[Job], int | None]) -> Job | None:
        """The first ready job that no budget fits and that has let enough batches go first: its turn, alone."""
        for job in self.head():
            if job.passed_over >= PATIENCE and cached(job) is not None:
                return job
        return None

    def _remove(self, taken: set[int]) -> None:
        for queue in (self._scores, self._encodes) if taken else ():
            kept = [job for job in queue if id(job) not in taken]
            queue.clear()
            queue.extend(kept)


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
        if job.user_id in self._slots:
            self._join(self._slots[job.user_id], job)
            return
        cold = job.prefix - cached > self._config.cold_after
        budget = min(self._tokens, self._cold_tokens) if cold else self._tokens
        slot = Slot(job.sequence, cached, job.prefix, [job])
        if slot.delta + len(job.candidates) > budget:
            part = self._split(slot, budget) if cold else None
            if part is None:
                self._too_large.append(slot)
                return
            slot.encode_to = part
        self._slots[job.user_id] = slot
        self._spend(slot.delta + (0 if slot.partial else len(job.candidates)), cold)

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
        if slot.partial or not longer.extends(shorter) or cost > self._tokens:
            return
        slot.sequence = longer
        slot.encode_to = len(longer.chain)
        slot.jobs.append(job)
        self._spend(cost, cold=False)

    def _spend(self, tokens: int, cold: bool) -> None:
        self._requests -= 1
        self._tokens -= tokens
        self._cold_tokens -= tokens if cold else 0
