"""A world around the index: page contents, and a plain model of what every user must have where.

A token's state is stood in for by its chain value. Pages are lists of such values, freed pages
are poisoned, and jobs do their reads, writes and page copies one by one at any time between
begin and end. So whatever the index calls valid can be compared with what is really there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mtserve.cache.index import Copy, Load, TieredIndex
from mtserve.cache.keys import extend_chain

WIDTH = 16


def make_chain(tokens: list[int]) -> np.ndarray:
    chain = np.zeros(len(tokens), np.uint64)
    extend_chain(chain, np.array(tokens, np.int64), 99)
    return chain


def common(a: list[int], b: list[int]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


@dataclass
class Known:
    """What the model says one user has."""

    chain: list[int]
    gpu: int = 0
    host: int = 0

    def cut(self) -> None:
        del self.chain[max(self.gpu, self.host) :]


@dataclass
class Job:
    kind: str
    ticket: int
    users: list[Known]
    steps: list[Callable[[], None]]  # work on bytes still to do
    verify: Callable[[], None] = lambda: None
    chains: list[list[int]] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    tokens: int = 0


class World:
    def __init__(self, rng: random.Random, page_tokens: int, gpu_pages: int, host_pages: int) -> None:
        self.rng, self.size = rng, page_tokens
        self.now = 0.0
        self.index = TieredIndex(page_tokens, gpu_pages, host_pages, clock=self.tick, track_freed=True)
        self.pages = {"gpu": {}, "host": {}}
        for tier, count in (("gpu", gpu_pages), ("host", host_pages)):
            self.pages[tier] = {page: [None] * page_tokens for page in range(count)}
        self.known: dict[str, Known] = {}
        self.jobs: list[Job] = []
        self.evictions = 0
        self.seen: set[str] = set()

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def count(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def poison_freed(self) -> None:
        for tier in ("gpu", "host"):
            for page in self.index.drain_freed(tier).tolist():
                self.pages[tier][page] = [None] * self.size

    def holds(self, tier: str, ids: list[int], chain: list[int], tokens: int) -> None:
        """Asserts that the pages really hold the states of the first `tokens` tokens."""
        for t in range(tokens):
            assert self.pages[tier][ids[t // self.size]][t % self.size] == chain[t], (tier, t)

    # ---- operations

    def begin_batch(self, users: list[str], tokens: list[list[int]]) -> Job:
        chains = [make_chain(row) for row in tokens]
        values = [chain.tolist() for chain in chains]
        cached, stored = np.full(len(users), -9, np.int32), np.full(len(users), -9, np.int32)
        table = np.full((len(users), WIDTH), -9, np.int32)
        known = [self.known.setdefault(user, Known([])) for user in users]
        for user, chain in zip(known, values, strict=True):
            self.correct(user, chain)
        before = self.index.stats()
        ticket = self.index.begin_batch(users, chains, cached, stored, table)
        self.poison_freed()
        job = Job("batch", ticket, known, [], chains=values, stored=stored.tolist())
        self.jobs.append(job)
        self.sync(before)
        rows = table.tolist()
        for user, chain, c, s, row in zip(known, values, cached.tolist(), stored.tolist(), rows, strict=True):
            assert c == min(user.gpu, len(chain))
            assert c <= s <= len(chain)
            if s < len(chain):
                assert s % self.size == 0
                assert self.index.stats().gpu.free == 0
                self.seen.add("short batch")
            assert all(page >= 0 for page in row[: self.count(s)])
            assert all(page == -1 for page in row[self.count(s) :])
            self.holds("gpu", row, chain, c)
            job.steps += [self.write(row[t // self.size], t % self.size, chain[t]) for t in range(c, s)]
        job.verify = lambda: [  # type: ignore[func-returns-value]
            self.holds("gpu", row, chain, c) for row, chain, c in zip(rows, values, cached.tolist(), strict=True)
        ]
        return job

    def write(self, page: int, offset: int, value: int) -> Callable[[], None]:
        return lambda: self.pages["gpu"][page].__setitem__(offset, value)

    def correct(self, user: Known, chain: list[int]) -> None:
        shared = common(user.chain, chain)
        if shared < min(len(user.chain), len(chain)):
            user.gpu, user.host = min(user.gpu, shared), min(user.host, shared)
            user.cut()
            self.seen.add("correction")
            for job in self.jobs:
                if job.kind == "store" and job.users[0] is user:
                    job.tokens = min(job.tokens, shared)
                    self.seen.add("correction during store")

    def begin_copy(self, kind: str, user: str, tokens: list[int]) -> Job | None:
        chain = make_chain(tokens)
        before, known = self.index.stats(), self.known.get(user)
        busy = self.open_kinds(known)
        plan: Copy | None
        if kind == "load":
            plan = self.index.begin_load(user, chain)
            target = min(known.host, common(known.chain, chain.tolist())) if known and not busy else 0
            present = known.gpu if known else 0
        else:
            plan = self.index.begin_store(user)
            target = known.gpu if known and not busy & {"load", "store"} else 0
            present = known.host if known else 0
        self.poison_freed()
        if plan is None:
            self.sync(before)
            tier = self.index.stats().gpu if kind == "load" else self.index.stats().host
            assert target <= present or (tier.free == 0 and present % self.size == 0)
            return None
        assert known is not None
        assert plan.first_token == present < plan.tokens <= target
        if plan.tokens < target:
            self.seen.add(f"short {kind}")
        job = Job(kind, plan.ticket, [known], self.copies(plan), tokens=plan.tokens)
        self.jobs.append(job)
        self.sync(before)
        return job

    def copies(self, plan: Copy) -> list[Callable[[], None]]:
        gpu, host = self.pages["gpu"], self.pages["host"]
        pairs = list(zip(plan.gpu_pages.tolist(), plan.host_pages.tolist(), strict=True))
        assert len(pairs) == self.count(plan.tokens) - plan.first_token // self.size
        if isinstance(plan, Load):
            return [lambda g=g, h=h: gpu.__setitem__(g, list(host[h])) for g, h in pairs]
        return [lambda g=g, h=h: host.__setitem__(h, list(gpu[g])) for g, h in pairs]

    def advance(self, job: Job, steps: int) -> None:
        for _ in range(min(steps, len(job.steps))):
            job.steps.pop(self.rng.randrange(len(job.steps)))()

    def end(self, job: Job, success: bool) -> None:
        if success:
            self.advance(job, len(job.steps))
        job.verify()
        before = self.index.stats()
        self.jobs.remove(job)
        getattr(self.index, f"end_{job.kind}")(job.ticket, success)
        self.poison_freed()
        for i, user in enumerate(job.users if success else []):
            self.publish(job, i, user)
        if not success:
            self.seen.add(f"failed {job.kind}")
        self.sync(before)

    def publish(self, job: Job, i: int, user: Known) -> None:
        if user not in self.known.values():
            self.seen.add("stale end")
            return
        self.seen.add(job.kind)
        if job.kind == "batch":
            user.chain.extend(job.chains[i][len(user.chain) : job.stored[i]])
            user.gpu = max(user.gpu, job.stored[i])
        elif job.kind == "load":
            user.gpu = max(user.gpu, job.tokens)
        else:
            user.host = max(user.host, job.tokens)

    def invalidate(self, user: str) -> None:
        before, known = self.index.stats(), self.known.pop(user, None)
        found = self.index.invalidate(user)
        assert found == (known is not None and bool(known.gpu or known.host or self.open_kinds(known)))
        self.poison_freed()
        self.sync(before)

    # ---- what must hold

    def open_kinds(self, user: Known | None) -> set[str]:
        return {job.kind for job in self.jobs for member in job.users if member is user}

    def sync(self, before) -> None:
        """Everything the index says equals the model, except for evictions, which must be exact and lawful."""
        self.index.check()
        after = self.index.stats()
        rows = {user: (gpu, host) for user, gpu, host in self.index.users()}
        lost = [0, 0]
        for user, known in list(self.known.items()):
            gpu, host = rows.pop(user, (0, 0))
            assert gpu <= known.gpu, user
            assert host <= known.host, user
            if (gpu, host) != (known.gpu, known.host):
                assert not self.open_kinds(known), f"{user} was evicted while pinned"
            lost[0] += self.count(known.gpu) - self.count(gpu)
            lost[1] += self.count(known.host) - self.count(host)
            known.gpu, known.host = gpu, host
            known.cut()
            if not gpu and not host and not self.open_kinds(known):
                del self.known[user]
        assert not rows, "users the model does not know"
        for pages, old, new in ((lost[0], before.gpu, after.gpu), (lost[1], before.host, after.host)):
            assert new.free + new.used + new.in_flight == new.total
            assert new.evicted_pages - old.evicted_pages == pages
            assert not pages or new.free == 0, "more was evicted than was missing"
            self.evictions += pages

    def look(self, user: str, tokens: list[int]) -> None:
        chain, known = make_chain(tokens), self.known.get(user)
        match, busy = self.index.lookup(user, chain), self.index.is_busy(user)
        shared = common(known.chain, chain.tolist()) if known else 0
        assert match.gpu_tokens == (min(known.gpu, shared) if known else 0)
        assert match.host_tokens == (min(known.host, shared) if known else 0)
        kinds = self.open_kinds(known) if known else set()
        assert busy == ("load" in kinds, "store" in kinds, "batch" in kinds)
