"""Which waiting users' states are brought from the host, and when their requests may run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from mtserve.cache.index import Load, Presence, TieredIndex
from mtserve.config import EngineConfig
from mtserve.engine.queue.pace import Pace
from mtserve.engine.queue.passing import Passing
from mtserve.engine.queue.window import in_turn, open_window
from mtserve.engine.request.job import Job
from mtserve.engine.tiers.transfers import Transfers
from mtserve.metrics import Metrics
from mtserve.transfer.mover import LOAD, Mover

# Times one request asks for its prefix from the host; evicted again before its batch, it is encoded.
MAX_LOADS = 2


class Onload:
    """Decides what to load for the first of the waiting jobs. The copies themselves are begun by the tiers."""

    def __init__(
        self, index: TieredIndex, mover: Mover, transfers: Transfers, config: EngineConfig, metrics: Metrics, pace: Pace
    ) -> None:
        self._index, self.mover, self._transfers, self._metrics = index, mover, transfers, metrics
        self._page_tokens = config.page_tokens
        self._pool_pages, self._page_bytes = len(mover.pool), mover.pool[:1].nbytes
        self._restore = config.restore
        self._failed: set[str] = set()  # users whose loads failed since the last `plan`
        self._window: dict[str, int] = {}  # users whose turn is near enough to load them -> pages kept for each
        self._near_jobs: set[Job] = set()  # theirs, of those surveyed last
        # What the index says of the first jobs, until something changes it.
        self._surveyed: dict[Job, Presence] = {}
        self._token_s, self._to_encode = 0.0, 0  # seconds a token; tokens of waiting jobs that nothing brings
        self.passing = Passing(pace, mover.pool.shape[1])
        self._decided: list[Load] = []
        self._declined = False

    def changed(self) -> None:
        """A batch or a copy has begun or ended, or states were forgotten: ask the index again."""
        self._surveyed.clear()

    def failed(self, users: Iterable[str]) -> None:
        """Loads of these users have failed: encode instead."""
        self._failed.update(users)

    def cached(self, job: Job) -> int | None:
        """Prefix tokens of `job` on the device; None while it should wait for room, or for its states to come."""
        if not self._near(job):
            return None
        present = self._presence(job)
        # A prefetch may have nothing to do but to wait for its load, which a batch would do in the loop's place.
        if present.in_batch or (present.loading and (job.prefetch or not self._comes(job.user_id))):
            return None
        tokens = max(present.gpu_tokens, present.arriving_tokens)
        if present.host_tokens > tokens and job.loads < MAX_LOADS:
            return None
        return tokens

    def spare(self, job: Job) -> bool:
        """Whether `job` may be encoded without keeping its states: the device has no room for it before others' turn is
        over, nothing is on its way for it, the host has what can be kept of it, and the link would take longer.
        """
        if self._restore == "load" or self._near(job) or job.prefetch or job.future.cancelled():
            return False
        present = self._presence(job)
        if present.loading or present.in_batch:
            return False
        if present.host_tokens <= present.gpu_tokens or not self._token_s:
            return False
        load_s = self._load_s(-(-present.host_tokens // self._page_tokens))
        return self._token_s * (job.prefix + len(job.candidates)) < load_s

    def restorable(self, job: Job) -> int | None:
        """Prefix tokens of `job` on the device, where the host has more and nothing is on its way; None for others."""
        if not self._near(job) or job.prefetch or job.future.cancelled():
            return None
        present = self._presence(job)
        if present.loading or present.in_batch or present.host_tokens <= present.gpu_tokens:
            return None
        return present.gpu_tokens

    def passes(self, job: Job) -> tuple[int, bool] | None:
        """Where `job` waits for its states, or for room, though it costs less to encode what it waits for than to take part
        in another batch: prefix tokens on the device, and whether there is room to keep the others. None for others.
        """
        if self._restore == "load" or job.prefetch or job.future.cancelled():
            return None
        present, near = self._presence(job), self._near(job)
        if present.loading or present.in_batch:
            return None
        # Without room it finds nothing now, nor what it would have kept the next time: all of the prefix at most.
        first, last = (present.gpu_tokens, present.host_tokens) if near else (0, job.prefix)
        return (first, near) if first < last and self._in_passing(job, first, last) else None

    def _comes(self, user_id: str) -> bool:
        """Whether the user's load has so little left that a batch should start over it."""
        ticket = self._transfers.loading(user_id)
        return ticket is not None and self.mover.near(ticket)

    def _near(self, job: Job) -> bool:
        return job in self._near_jobs or self._fits(job, self._window)

    def _fits(self, job: Job, window: dict[str, int]) -> bool:
        return -(-len(job.sequence.chain) // self._page_tokens) <= window.get(job.user_id, 0)

    def _held_tokens(self, job: Job) -> int:
        """Prefix tokens that the device has, or has after the load under way."""
        present = self._presence(job)
        return max(present.gpu_tokens, present.arriving_tokens)

    def _presence(self, job: Job) -> Presence:
        known = self._surveyed.get(job)
        return known if known is not None else self._index.survey([job.user_id], [job.sequence.chain])[0]

    def survey(self, jobs: Sequence[Job], token_s: float, reserved_pages: int) -> None:
        """Look at what each tier has of these jobs' prefixes.

        Only users whose prefixes the device can hold together, the first in turn, beside the `reserved_pages` of the batch
        under way, are near: more would evict one another. `token_s`: seconds in which the device encodes a token, 0 where
        not known.
        """
        found = self._index.survey([job.user_id for job in jobs], [job.sequence.chain for job in jobs])
        self._surveyed = dict(zip(jobs, found, strict=True))
        near = self._open_window(jobs, reserved_pages)
        self._near_jobs, self._token_s = set(near), token_s
        waiting = sum([job.prefix + len(job.candidates) for job in jobs])
        self._to_encode = waiting - sum([self._held_tokens(job) for job in near])
        if self._failed or self._restore == "recompute":
            self._encode_instead(near)

    def _encode_instead(self, near: Sequence[Job]) -> None:
        """Nothing is loaded for those of these jobs whose loads have failed, or for any where none are wanted."""
        for job in near:
            if self._restore == "recompute" or job.user_id in self._failed:
                job.loads, job.loaded_from = MAX_LOADS, -1
        self._failed.clear()

    def plan(self, jobs: Sequence[Job]) -> tuple[list[Load], bool]:
        """Loads to start now, of what the host holds of the prefixes of those of these jobs that are near; and whether
        some of them need not wait for any.
        """
        self._decided, self._declined = [], False
        waiting = [job for job in jobs if self._near(job) and _waits(self._presence(job))]
        # Whoever had better be encoded in a batch that others make anyway needs no load.
        ready = any(self.cached(job) is not None for job in jobs) if waiting else False
        for job in waiting:
            if not ready or self.passes(job) is None:
                self._bring(job, self._presence(job))
        return self._decided, self._declined

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
            self._decline(job)
            self._metrics.count("loads_declined_total")

    def _loads_sooner(self, job: Job, present: Presence) -> bool:
        """Whether the link, after all that it has to bring, is expected to be done before the device would be with what
        else it has to encode, or, where that is less, before it could have encoded the job's own prefix again.

        Both then work all the time, and end together, as long as requests wait.
        """
        if self._restore == "load" or not self._token_s:
            return True
        first, last = present.gpu_tokens // self._page_tokens, -(-present.host_tokens // self._page_tokens)
        load_s = self._load_s(sum(len(load.gpu_pages) for load in self._decided) + last - first)
        saved, own = present.host_tokens - present.gpu_tokens, job.prefix - present.gpu_tokens + len(job.candidates)
        return load_s <= self._token_s * max(self._to_encode - saved, own)

    def _in_passing(self, job: Job, first: int, last: int) -> bool:
        """Whether tokens [first, last) cost less, in a batch that runs anyway, than a share of another one."""
        if not self._token_s:
            return False
        users = len(self._window)
        return self.passing.cheaper(job.sequence, first, last, users=users, token_s=self._token_s)

    def _load_s(self, pages: int) -> float:
        """Seconds in which the link is expected to have brought so many pages, after all that is under way."""
        return self.mover.load_s(self._transfers.moving_bytes(LOAD) + pages * self._page_bytes)

    def _open_window(self, jobs: Sequence[Job], reserved_pages: int) -> Sequence[Job]:
        """Choose who has room, and return those of `jobs` that are theirs."""
        # Where nothing but a load brings what the host has, states that find no pages are dear.
        waits = self._restore == "load"
        choose = partial(
            open_window, pages=self._pool_pages - reserved_pages, page_tokens=self._page_tokens, held=self._transfers.held(),
            idle=not reserved_pages and not (waits and self._transfers.moving), wait_for_copies=waits,
        )  # fmt: skip
        window = choose(jobs)
        near = [job for job in jobs if self._fits(job, window)]
        if len(near) < len(jobs):
            window = choose(in_turn(jobs, self._held_tokens))
            near = [job for job in jobs if self._fits(job, window)]
        users = list(window)
        if users != list(self._window):
            self._index.set_window(users)
        self._window = window
        return near

    def _begin_load(self, job: Job, gpu_tokens: int) -> None:
        load = self._index.begin_load(job.user_id, job.sequence.chain)
        if load is None:
            if not self._transfers.moving and not self._decided:
                self._decline(job)  # no copy will end and make room
            return
        self._surveyed.clear()  # the load may have evicted others
        job.loads += 1
        job.loaded_from = gpu_tokens if job.loaded_from < 0 else min(job.loaded_from, gpu_tokens)
        self._decided.append(load)
        self._to_encode -= load.tokens - gpu_tokens

    def _decline(self, job: Job) -> None:
        job.loads, self._declined = MAX_LOADS, True

    def _share_load(self, job: Job, gpu_tokens: int) -> None:
        """A second request of a user whose load is under way waits for the same one."""
        if job.loads == 0:
            job.loads, job.loaded_from = 1, gpu_tokens


def _waits(present: Presence) -> bool:
    """Whether a load brings, or could bring, what the device has not."""
    return present.loading or present.host_tokens > present.gpu_tokens
