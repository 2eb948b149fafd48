"""The page allocator: against a plain set, and how long the runs are that it makes of a user's pages."""

from __future__ import annotations

import random

import pytest

from mtserve._core import PageAllocator
from mtserve.errors import CorruptState, InvalidArgument

RUN = 16


def drain(allocator: PageAllocator) -> list[int]:
    return memoryview(allocator._drain_freed()).cast("i").tolist()


def runs(pages: list[int]) -> list[int]:
    """Lengths of the runs of neighbours."""
    breaks = [i for i in range(1, len(pages)) if pages[i] != pages[i - 1] + 1]
    return [end - begin for begin, end in zip([0, *breaks], [*breaks, len(pages)], strict=True)]


@pytest.mark.parametrize("pages", [0, 1, 15, 16, 17, 255, 257, 70_000])
def test_hands_out_every_page_once_in_order(pages: int):
    allocator = PageAllocator(pages)
    assert allocator.take(pages + 5) == list(range(pages))
    assert (allocator.take(1), allocator.free, allocator.total) == ([], 0, pages)
    allocator.check()
    for page in reversed(range(pages)):
        allocator.release(page)
    allocator.check()
    assert allocator.free == pages


class Fuzzed:
    """An allocator beside the plain sets of what is free, and of what was freed since the last drain."""

    def __init__(self, pages: int, rng: random.Random) -> None:
        self.allocator, self.rng = PageAllocator(pages, track_freed=True), rng
        self.free, self.freed = set(range(pages)), set[int]()
        self.owners: list[list[int]] = [[] for _ in range(6)]

    def take(self, count: int) -> None:
        owned = self.rng.choice(self.owners)
        neighbours = 0
        while owned and neighbours < count and owned[-1] + 1 + neighbours in self.free:
            neighbours += 1
        taken = self.allocator.take(count, owned)
        assert len(taken) == min(count, len(self.free))
        assert len(set(taken)) == len(taken)
        assert self.free.issuperset(taken)
        assert taken[:neighbours] == [owned[-1] + 1 + i for i in range(neighbours)]
        self.free.difference_update(taken)
        owned.extend(taken)

    def release(self, count: int) -> None:
        owned = self.rng.choice(self.owners)
        if self.rng.random() < 0.3:
            self.rng.shuffle(owned)
        for _ in range(min(count, len(owned))):
            page = owned.pop()
            self.allocator.release(page)
            self.free.add(page)
            self.freed.add(page)

    def grow(self, pages: int) -> None:
        total = self.allocator.total
        self.allocator.grow(pages)
        assert self.allocator.total == total + pages
        self.free.update(range(total, total + pages))

    def verify(self) -> None:
        self.allocator.check()
        assert self.allocator.free == len(self.free)

    def verify_pages(self) -> None:
        assert {page for page in range(self.allocator.total) if self.allocator.is_free(page)} == self.free
        assert sorted(drain(self.allocator)) == sorted(self.freed)
        self.freed.clear()


@pytest.mark.parametrize(("pages", "seed"), [(0, 0), (7, 1), (130, 2), (1500, 3)])
def test_fuzz_against_a_set(pages: int, seed: int):
    rng = random.Random(seed)
    fuzzed = Fuzzed(pages, rng)
    for step in range(3000):
        count = rng.choice([0, 1, 1, 2, 5, 15, 16, 17, 40])
        if rng.random() < 0.01:
            fuzzed.grow(rng.choice([0, 1, 3, 16, 29]))
        elif rng.random() < (0.65 if step // 500 % 2 else 0.4):
            fuzzed.take(count)
        else:
            fuzzed.release(count)
        fuzzed.verify()
        if step % 100 == 0:
            fuzzed.verify_pages()
    fuzzed.take(fuzzed.allocator.total)
    fuzzed.verify()
    assert fuzzed.allocator.free == 0, "every free page can be had by anybody"


def test_refuses_double_release_and_foreign_pages():
    allocator = PageAllocator(3)
    (page,) = allocator.take(1)
    allocator.release(page)
    with pytest.raises(CorruptState, match="already free"):
        allocator.release(page)
    for foreign in (-1, 3):
        with pytest.raises(InvalidArgument):
            allocator.release(foreign)
    with pytest.raises(InvalidArgument, match="int32"):
        allocator.take(1, [2**31])
    assert allocator.free == 3
    allocator.check()


def test_refuses_more_pages_than_ids():
    for count in (-1, 2**31):
        with pytest.raises(InvalidArgument) as refused:
            PageAllocator(count)
        assert refused.value.field == "pages"
    allocator = PageAllocator(5)
    for count in (-1, 2**31 - 5):
        with pytest.raises(InvalidArgument, match=f"{2**31 - 6}"):
            allocator.grow(count)
    assert (allocator.total, allocator.free) == (5, 5)
    allocator.check()


def test_grown_pages_join_a_run_and_are_reported_when_freed():
    allocator = PageAllocator(20, track_freed=True)
    owned = allocator.take(20)
    allocator.grow(13)
    assert allocator.take(13, owned) == list(range(20, 33))
    for page in (32, 20, 19):
        allocator.release(page)
    assert allocator.take(1, [31]) == [32]
    allocator.release(32)
    assert sorted(drain(allocator)) == [19, 20, 32]
    assert drain(allocator) == []


def holes(*lengths: int) -> PageAllocator:
    """A block for each length, with that many free pages at its front."""
    allocator = PageAllocator(len(lengths) * RUN)
    allocator.take(len(lengths) * RUN)
    for block, length in enumerate(lengths):
        for i in range(length):
            allocator.release(block * RUN + i)
    return allocator


@pytest.mark.parametrize(
    ("count", "held", "expected"),
    [
        (3, [], [48, 49, 50]),  # the shortest hole that suffices
        (1, [3 * RUN + 15], [64]),  # the neighbour before any hole
        (1, [RUN + 15, *range(40, 43)], [48]),  # room for as many pages as are held
        (1, [33, *range(40, 47)], [0]),
        (1, [*range(25, 41), 46], [64]),  # a whole block for a history of a block or more
        (18, [], [*range(64, 80), 16, 17]),
        (20, [], [*range(64, 80), 48, 49, 50, 51]),
    ],
)
def test_which_hole_is_taken(count: int, held: list[int], expected: list[int]):
    allocator = holes(8, 2, 0, 4, 16, 0)
    assert allocator.take(count, held) == expected
    allocator.check()


def test_without_a_whole_block_a_long_history_grows_into_the_shortest_run_but_not_single_pages():
    allocator, held = holes(1, 9, 3, 1), [*range(25, 32), *range(1, 15)]
    assert allocator.take(1, held) == [32]
    assert allocator.take(30, held) == [*range(16, 25), 33, 34, 0, 48]
    assert allocator.free == 0


class Pool:
    """Users under the oldest-first eviction of tails, in a pool that keeps a part free."""

    def __init__(self, pages: int, full: float, seed: int) -> None:
        self.allocator, self.rng = PageAllocator(pages), random.Random(seed)
        self.slack = round(pages * (1 - full))
        self.users: dict[int, list[int]] = {}  # the oldest first
        self.lengths: dict[int, int] = {}  # of users that still grow

    def extend(self, user: int, count: int) -> None:
        owned = self.users[user] = self.users.pop(user, [])
        while (shortfall := self.slack + count - self.allocator.free) > 0:
            oldest, pages = next(iter(self.users.items()))
            for _ in range(min(shortfall, len(pages))):
                self.allocator.release(pages.pop())
            if not pages:
                del self.users[oldest]
                self.lengths.pop(oldest, None)
        owned.extend(self.allocator.take(count, owned))

    def churn(self, steps: int, loads: float) -> None:
        """Each step loads a user of 1 to 313 pages (log-uniform), or lets one grow by a page, up to twice as many."""
        for step in range(steps):
            if self.rng.random() < loads or len(self.lengths) < 50:
                length = int(313.99 ** self.rng.random())
                self.extend(step, length)
                self.lengths[step] = min(313, length + self.rng.randrange(1, 1 + length))
            else:
                user = self.rng.choice(list(self.lengths))
                self.extend(user, 1)
                if len(self.users[user]) >= self.lengths[user]:
                    del self.lengths[user]

    def weighted_run(self, at_least: int) -> float:
        """Mean over the pages of such users of the length of the run that the page is in."""
        lengths = [length for pages in self.users.values() if len(pages) >= at_least for length in runs(pages)]
        return sum(length * length for length in lengths) / sum(lengths)

    def mean_runs(self, shortest: int, longest: int) -> float:
        """Mean number of runs of users of so many pages."""
        counts = [len(runs(pages)) for pages in self.users.values() if shortest <= len(pages) <= longest]
        return sum(counts) / len(counts)


@pytest.mark.parametrize(("full", "loads"), [(0.95, 0.1), (0.95, 0.2), (0.95, 1.0), (0.98, 0.5)])
def test_runs_under_churn(full: float, loads: float):
    pool = Pool(20_000, full, seed=7)
    pool.churn(60_000, loads)
    pool.allocator.check()
    assert pool.allocator.free == pool.slack
    assert pool.weighted_run(32) >= 12
    assert pool.mean_runs(9, 13) <= (2.5 if loads < 1 else 1.1)


def test_50_users_who_grow_in_turn_keep_their_runs():
    allocator, users = PageAllocator(16_000), [list[int]() for _ in range(50)]
    for _ in range(313):
        for pages in users:
            pages += allocator.take(1, pages)
    allocator.check()
    lengths = [length for pages in users for length in runs(pages)]
    assert sum(lengths) / len(lengths) >= 8
