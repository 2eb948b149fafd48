"""A world around the index: page contents, and a plain model of what every user must have where.

A token's state is stood in for by its chain value. Pages are lists of such values, freed pages
are poisoned, and jobs do their reads, writes and page copies one by one at any time between
begin and end. So whatever the index calls valid can be compared with what is really there.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from tiered_index_jobs import Job, Known, Part, Step, common, make_chain

from mtserve.cache.index import Copy, Load, Store, TieredIndex
from mtserve.errors import FailedPrecondition

WIDTH = 16


class World:
    def __init__(
        self, rng: random.Random, page_tokens: int, gpu_pages: int, host_pages: int, policy: str = "lru"
    ) -> None:
        self.rng, self.size = rng, page_tokens
        self.now = 0.0
        self.index = TieredIndex(
            page_tokens, gpu_pages, host_pages, policy, self.tick, track_freed=True, pin_budget=0.3
        )
        self.pages = {"gpu": {}, "host": {}}
        for tier, count in (("gpu", gpu_pages), ("host", host_pages)):
            self.pages[tier] = {page: [None] * page_tokens for page in range(count)}
        self.known: dict[str, Known] = {}
        self.jobs: list[Job] = []
        self.evictions = 0
        self.window: list[str] = []
        self.pinned: set[str] = set()
        self.taker = ""  # for whom a copy is being begun
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

    def holds(self, tier: str, ids: list[int], chain: list[int], tokens: range) -> None:
        """Asserts that the pages, the first of which has token `tokens.start`, hold the states of those tokens."""
        first = tokens.start // self.size
        for t in tokens:
            assert self.pages[tier][ids[t // self.size - first]][t % self.size] == chain[t], (tier, t)

    def part(self, kind: str, known: Known | None) -> Part | None:
        """The user's part of the open job of that kind."""
        parts = [part for job in self.jobs if job.kind == kind for part in job.parts if part.known is known]
        return parts[0] if parts else None

    def is_live(self, known: Known) -> bool:
        return self.known.get(known.user) is known

    # ---- batches

    def begin_batch(self, users: list[str], tokens: list[list[int]], again: list[bool]) -> Job:
        chains = [make_chain(row) for row in tokens]
        cached, stored = np.full(len(users), -9, np.int32), np.full(len(users), -9, np.int32)
        table = np.full((len(users), WIDTH), -9, np.int32)
        known = [self.known.setdefault(user, Known(user)) for user in users]
        for user, chain in zip(known, chains, strict=True):
            self.correct(user, chain.tolist())
        before = self.index.stats()
        ticket = self.index.begin_batch(users, chains, cached, stored, table, again)
        self.poison_freed()
        rows = zip(known, chains, cached.tolist(), stored.tolist(), table.tolist(), strict=True)
        job = Job("batch", ticket, [self.member(user, chain.tolist(), *row) for user, chain, *row in rows])
        self.jobs.append(job)
        self.sync(before)
        return job

    def member(self, user: Known, chain: list[int], cached: int, stored: int, row: list[int]) -> Part:
        """A batch's work for one user: it reads the states of [0, cached) and writes those of [cached, stored)."""
        load = self.part("load", user)
        assert cached == min(max(user.gpu, load.tokens if load else 0), len(chain))
        assert cached <= stored <= len(chain)
        if stored < len(chain):
            assert stored % self.size == 0
            assert self.index.stats().gpu.free == 0
            self.seen.add("short batch")
        assert all(page >= 0 for page in row[: self.count(stored)])
        assert all(page == -1 for page in row[self.count(stored) :])

        def verify() -> None:
            if part.bytes_arrived and not part.spoiled:
                self.holds("gpu", row, chain, range(cached))

        writes = [self.write(row[t // self.size], t % self.size, chain[t]) for t in range(cached, stored)]
        part = Part(user, stored, [verify, *writes], verify, chain, load)
        part.verify()
        return part

    def write(self, page: int, offset: int, value: int) -> Step:
        return lambda: self.pages["gpu"][page].__setitem__(offset, value)

    def correct(self, user: Known, chain: list[int]) -> None:
        shared = common(user.chain, chain)
        if shared >= min(len(user.chain), len(chain)):
            return
        user.gpu, user.host = min(user.gpu, shared), min(user.host, shared)
        user.cut()
        self.seen.add("correction")
        for kind in ("load", "store"):
            copy = self.part(kind, user)
            if copy and copy.tokens > shared:
                copy.tokens = shared
                self.seen.add(f"correction during {kind}")

    # ---- copies

    def begin_load(self, user: str, tokens: list[int]) -> Job | None:
        chain = make_chain(tokens)
        before, known = self.index.stats(), self.known.get(user)
        plan = self.index.begin_load(user, chain)
        self.taker = user
        self.poison_freed()
        target = min(known.host, common(known.chain, chain.tolist())) if known and not self.open_kinds(known) else 0
        if plan is None:
            self.sync(before)
            present = known.gpu if known else 0
            assert target <= present or (self.index.stats().gpu.free == 0 and present % self.size == 0)
            return None
        return self.begin_copies([plan], {user: target}, before)[0]

    def begin_stores(self, users: list[str], tail: bool, pages: int) -> list[Job]:
        before = self.index.stats()
        target = {}
        for user, known in self.known.items():
            idle = not self.open_kinds(known) & {"load", "store"}
            target[user] = (known.gpu if tail else known.gpu // self.size * self.size) if idle else 0
        behind = {user for user in users if user in target and target[user] > self.known[user].host}
        plans, unasked = self.index.begin_stores(users, tail, pages)
        self.poison_freed()
        asked = users[: len(users) - len(unasked)]
        assert asked + list(unasked) == users
        planned = {plan.user: len(plan.gpu_pages) for plan in plans}
        assert [plan.user for plan in plans] == [user for user in asked if user in planned]
        for user in asked:
            assert pages > 0, "asked on after enough was planned"
            pages -= planned.get(user, 0)
        if unasked:
            assert pages <= 0, "stopped early"
            self.seen.add("pages planned")
        jobs = self.begin_copies(plans, target, before)
        for user in behind & set(asked) - planned.keys():
            assert self.index.stats().host.free == 0
            assert self.known[user].host % self.size == 0
        if self.index.stats().declined_stores > before.declined_stores:
            self.seen.add("declined store")
        return jobs

    def begin_copies(self, plans: list[Load] | list[Store], target: dict[str, int], before) -> list[Job]:
        """Jobs for plans of one call. What these evicted they evicted before the users' own tickets were open."""
        self.sync(before)
        jobs = []
        for plan in plans:
            known, kind = self.known[plan.user], type(plan).__name__.lower()
            present = known.gpu if kind == "load" else known.host
            assert plan.first_token == present < plan.tokens <= target[plan.user]
            if plan.tokens < target[plan.user]:
                assert plan.tokens % self.size == 0
                self.seen.add(f"short {kind}")
            jobs.append(Job(kind, plan.ticket, [self.copy(plan, known)]))
        self.jobs += jobs
        return jobs

    def copy(self, plan: Copy, known: Known) -> Part:
        gpu, host = self.pages["gpu"], self.pages["host"]
        pairs = list(zip(plan.gpu_pages.tolist(), plan.host_pages.tolist(), strict=True))
        assert len(pairs) == self.count(plan.tokens) - plan.first_token // self.size
        into, ids = ("gpu", plan.gpu_pages.tolist()) if isinstance(plan, Load) else ("host", plan.host_pages.tolist())

        def verify() -> None:
            if self.is_live(known) and not part.steps:
                self.holds(into, ids, known.chain, range(plan.first_token, part.tokens))

        steps: list[Step] = [lambda g=g, h=h: gpu.__setitem__(g, list(host[h])) for g, h in pairs]
        if into == "host":
            steps = [lambda g=g, h=h: host.__setitem__(h, list(gpu[g])) for g, h in pairs]
        part = Part(known, plan.tokens, steps, verify)
        return part

    # ---- ends

    def end(self, job: Job, success: bool) -> None:
        if success and job.loading:
            self.refuse(job)
            return
        if success:
            job.finish(self.rng)
        for part in job.parts:
            part.verify()
        before = self.index.stats()
        self.jobs.remove(job)
        told = getattr(self.index, f"end_{job.kind}")(job.ticket, success)
        self.poison_freed()
        if job.kind == "batch":
            assert told == [part.known.user for part in job.parts if part.spoiled]
        if success:
            for part in job.parts:
                self.publish(job, part)
        else:
            self.seen |= {f"failed {job.kind}"} | ({"failed batch before its load"} if job.loading else set())
        job.close(success)
        self.sync(before)

    def refuse(self, job: Job) -> None:
        """A batch cannot succeed before a load that it was begun over has ended."""
        before = self.index.stats(), self.index.users()
        with pytest.raises(FailedPrecondition, match="still open"):
            self.index.end_batch(job.ticket, True)
        assert (self.index.stats(), self.index.users()) == before
        self.index.check()
        self.seen.add("success before the load")

    def publish(self, job: Job, part: Part) -> None:
        user = part.known
        if not self.is_live(user):
            self.seen.add("stale end")
        elif part.spoiled:
            self.seen.add("spoiled batch")
        elif job.kind == "batch":
            user.chain.extend(part.chain[len(user.chain) : part.tokens])
            user.gpu = max(user.gpu, part.tokens)
            self.seen.add("batch over load" if part.load else "batch")
        elif job.kind == "load":
            user.gpu = max(user.gpu, part.tokens)
            self.seen.add("load")
        else:
            user.host = max(user.host, part.tokens)
            self.seen.add("store")

    def invalidate(self, user: str) -> None:
        before, known = self.index.stats(), self.known.pop(user, None)
        if self.open_kinds(known) >= {"batch", "load"}:
            self.seen.add("invalidated over load")
        found = self.index.invalidate(user)
        assert found == (known is not None and bool(known.gpu or known.host or self.open_kinds(known)))
        self.poison_freed()
        self.sync(before)

    # ---- privileges

    def pin(self, users: list[str]) -> None:
        assert self.index.pin(users) == len(set(users) - self.pinned)
        self.pinned |= set(users)
        self.sync(self.index.stats())

    def unpin(self, users: list[str]) -> None:
        assert self.index.unpin(users) == len(set(users) & self.pinned)
        self.pinned -= set(users)
        self.sync(self.index.stats())

    def set_window(self, users: list[str]) -> None:
        self.window = users
        self.index.set_window(users)
        self.sync(self.index.stats())

    def check_window(self, shrunk: dict[str, tuple[bool, bool]]) -> None:
        """Whose turn is near loses states on the device alone, and there not before those who have none or a later one."""
        for user in set(self.window) & shrunk.keys():
            assert not shrunk[user][1], f"{user}, whose turn is near, lost host pages"
            later = [each for each in self.known if each not in self.window[: self.window.index(user) + 1]]
            for each in later:
                left = self.known[each].gpu and each != self.taker and not self.open_kinds(self.known[each])
                assert not left, f"{each} kept what {user}, whose turn comes first, lost"
            self.seen.add("eviction in the window")
        if any(shrunk[user][0] for user in shrunk.keys() - set(self.window)) and self.window:
            self.seen.add("eviction beside a window")

    def check_pins(self, after) -> None:
        assert after.pinned == len(self.pinned)
        for tier in (after.gpu, after.host):
            assert tier.pinned_pages <= 0.3 * tier.total
            assert tier.pinned_users <= min(len(self.pinned), tier.pinned_pages)
        self.seen |= {"covered pins"} if after.gpu.pinned_pages and after.host.pinned_pages else set()

    def grow_host(self, pages: int) -> None:
        before = self.index.stats()
        self.index.grow_host(pages)
        self.pages["host"] |= {before.host.total + i: [None] * self.size for i in range(pages)}
        after = self.index.stats()
        pins = {"pinned_users": after.host.pinned_users, "pinned_pages": after.host.pinned_pages}
        grown = before.host._replace(total=before.host.total + pages, free=before.host.free + pages, **pins)
        assert after == before._replace(host=grown)
        self.sync(before)

    # ---- what must hold

    def open_kinds(self, user: Known | None) -> set[str]:
        return {job.kind for job in self.jobs for part in job.parts if part.known is user}

    def sync(self, before) -> None:
        """Everything the index says equals the model, except for evictions, which must be exact and lawful."""
        self.index.check()
        after = self.index.stats()
        rows = {user: (gpu, host) for user, gpu, host in self.index.users()}
        lost, unsaved, shrunk = [0, 0], 0, {}
        for user, known in list(self.known.items()):
            gpu, host = rows.pop(user, (0, 0))
            assert gpu <= known.gpu, user
            assert host <= known.host, user
            if (gpu, host) != (known.gpu, known.host):
                assert not self.open_kinds(known), f"{user} was evicted while busy"
                shrunk[user] = (gpu < known.gpu, host < known.host)
            lost[0] += self.count(known.gpu) - self.count(gpu)
            lost[1] += self.count(known.host) - self.count(host)
            unsaved += len({t // self.size for t in range(gpu, known.gpu) if t >= known.host})
            known.gpu, known.host = gpu, host
            known.cut()
            if not gpu and not host and not self.open_kinds(known):
                del self.known[user]
        assert not rows, "users the model does not know"
        self.check_counts(before, after, lost, unsaved)
        self.check_window(shrunk)
        self.check_pins(after)
        self.taker = ""

    def check_counts(self, before, after, lost: list[int], unsaved: int) -> None:
        for pages, old, new in ((lost[0], before.gpu, after.gpu), (lost[1], before.host, after.host)):
            assert new.free + new.used + new.in_flight == new.total
            assert new.evicted_pages - old.evicted_pages == pages
            assert not pages or new.free == 0, "more was evicted than was missing"
            self.evictions += pages
        assert after.unsaved_pages - before.unsaved_pages == unsaved
        self.seen |= {"unsaved eviction"} if unsaved else set()
        self.seen |= {"saved eviction"} if lost[0] > unsaved else set()

    def look(self, user: str, tokens: list[int]) -> None:
        chain, known = make_chain(tokens), self.known.get(user)
        busy, (found,) = self.index.is_busy(user), self.index.survey([user], [chain])
        shared = common(known.chain, chain.tolist()) if known else 0
        load = self.part("load", known) if known else None
        assert found.gpu_tokens == (min(known.gpu, shared) if known else 0)
        assert found.host_tokens == (min(known.host, shared) if known else 0)
        assert found.arriving_tokens == (min(load.tokens, shared) if load else 0)
        kinds = self.open_kinds(known) if known else set()
        assert busy == ("load" in kinds, "store" in kinds, "batch" in kinds)
