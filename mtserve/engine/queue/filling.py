"""A batch being filled: which users are in it, and what budgets they leave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mtserve.config import EngineConfig
from mtserve.engine.request.job import Job
from mtserve.engine.request.sequence import UserSequence


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
    def candidates(self) -> int:
        return sum([len(job.candidates) for job in self.jobs])

    @property
    def delta(self) -> int:
        return self.encode_to - self.cached

    @property
    def again(self) -> bool:
        """Whether all of its jobs had batches before: parts of their prefix, or one whose load failed."""
        return all(job.begun for job in self.jobs)


class Filling:
    """A batch being filled under its budgets."""

    def __init__(self, config: EngineConfig, static_attention: str) -> None:
        self._config = config
        self._static_attention = static_attention
        self._slots: dict[str, Slot] = {}
        self._too_large: list[Slot] = []
        self._tokens = config.max_batch_tokens
        self._cold_tokens = config.cold_batch_tokens
        self._requests = config.max_batch_requests
        self._restores = False  # loads of some may evict what the device has of others

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
        if self._restores:
            self._add_whole(slot)
            return
        cost = slot.encode_to - cached
        # Prefetches are many or large, and nobody waits for them: they lengthen a batch no more than cold users do.
        cold = job.prefetch or cost > self._config.cold_after
        budget = self._budget(cold)
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
    def empty(self) -> bool:
        return not self._slots

    @property
    def nothing_ready(self) -> bool:
        return not self._slots and not self._too_large

    def offer_restored(self, job: Job, cached: int) -> None:
        """Take `job` in where there is room for all of its prefix, as from now on for everybody's."""
        slot = self._slots.get(job.user_id)
        if slot is not None:
            self._join(slot, job)
            return
        self._restores = True
        self._add_whole(Slot(job.sequence, cached, len(job.sequence.chain), [job], restored=True))

    def _add_whole(self, slot: Slot, *, cold: bool = False) -> None:
        cost = slot.encode_to + slot.candidates
        # The first alone may be larger than the budget: it would fit no other batch either.
        if self._slots and (self._requests <= 0 or cost > self._budget(cold)):
            return
        self._slots[slot.user_id] = slot
        self._spend(cost, cold)

    def open_to_spare(self, idle: bool) -> bool:
        """Whether jobs that must wait may fill the batch: it runs anyway, or the device is `idle` and nobody is ready."""
        return not self.empty or (idle and not self._too_large)

    def offer_whole(self, jobs: Iterable[Job]) -> None:
        """Take `jobs` in without pages, as far as the budget of cold users allows."""
        for job in jobs:
            if self.full:
                break
            self._offer_whole(job)

    def _offer_whole(self, job: Job) -> None:
        slot = self._slots.get(job.user_id)
        if slot is not None:
            self._join(slot, job)
            return
        self._add_whole(Slot(job.sequence, 0, len(job.sequence.chain), [job], keep=False), cold=True)

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
        """Add another request of a user, if it is another, when one history is the other's prefix, in one generation."""
        longer, shorter = job.sequence, slot.sequence
        if len(longer.chain) < len(shorter.chain):
            longer, shorter = shorter, longer
        cost = len(longer.chain) - len(slot.sequence.chain) + len(job.candidates)
        budget = self._budget(job.prefetch)
        if job in slot.jobs or slot.partial or not longer.extends(shorter) or cost > budget:
            return
        slot.sequence = longer
        slot.encode_to = len(longer.chain)
        slot.jobs.append(job)
        self._spend(cost, cold=job.prefetch)

    def _budget(self, cold: bool) -> int:
        """Tokens that are left for one more."""
        return min(self._tokens, self._cold_tokens) if cold else self._tokens

    def _spend(self, tokens: int, cold: bool) -> None:
        self._requests -= 1
        self._tokens -= tokens
        self._cold_tokens -= tokens if cold else 0
