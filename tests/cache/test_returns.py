"""How long evicted users stay away: told once, when what they lost is wanted again, and by nothing else."""

from __future__ import annotations

import numpy as np

from mtserve.cache.index import TieredIndex

PAGE = 4


class Life:
    """An index of four GPU pages on a clock moved by hand; a user's chain of n tokens starts that of n + 1."""

    def __init__(self, host_pages: int = 20) -> None:
        self.now = 10.0
        self.index = TieredIndex(PAGE, 4, host_pages, clock=lambda: self.now)

    def chain(self, user: str, tokens: int, corrected_at: int | None = None) -> np.ndarray:  # type: ignore[type-arg]
        chain = np.arange(tokens, dtype=np.uint64) + np.uint64(1000 * ord(user))
        if corrected_at is not None:
            chain[corrected_at:] += np.uint64(500)
        return chain

    def batch(self, user: str, tokens: int, corrected_at: int | None = None, *, save: bool = True) -> None:
        cached, stored = np.zeros(1, np.int32), np.zeros(1, np.int32)
        table = np.zeros((1, 8), np.int32)
        chain = self.chain(user, tokens, corrected_at)
        self.index.end_batch(self.index.begin_batch([user], [chain], cached, stored, table), True)
        if save:
            self.store(user)
        self.index.check()

    def store(self, user: str) -> None:
        store = self.index.begin_store(user)
        if store is not None:
            self.index.end_store(store.ticket, True)

    def load(self, user: str, tokens: int) -> None:
        load = self.index.begin_load(user, self.chain(user, tokens))
        assert load is not None
        self.index.end_load(load.ticket, True)

    def evicted(self) -> Life:
        """User a had 12 tokens in three pages, saved; at 20 b needs all four pages; now it is 25."""
        self.batch("a", 12)
        self.now = 20.0
        self.batch("b", 16)
        self.now = 25.0
        assert self.index.drain_returns() == []
        return self


def test_a_load_brings_them_back() -> None:
    life = Life().evicted()
    life.load("a", 12)
    assert life.index.drain_returns() == [5.0]
    life.now = 26.0
    life.batch("a", 13)
    assert life.index.drain_returns() == []


def test_a_batch_that_encodes_again_counts_too() -> None:
    life = Life().evicted()
    life.batch("a", 12)
    assert life.index.drain_returns() == [5.0]


def test_time_counts_from_the_first_of_several_evictions() -> None:
    life = Life()
    life.batch("a", 16)
    for now, user in ((20.0, "b"), (21.0, "c"), (22.0, "d")):
        life.now = now
        life.batch(user, 4)
    life.now = 30.0
    life.load("a", 16)
    assert life.index.drain_returns() == [10.0]


def test_a_history_that_what_was_kept_suffices_for_is_no_return() -> None:
    life = Life()
    life.batch("a", 16)
    life.now = 20.0
    life.batch("b", 4)
    life.now = 22.0
    life.batch("a", 9)
    assert life.index.drain_returns() == []
    life.batch("a", 16)
    assert life.index.drain_returns() == [2.0]


def test_what_a_correction_made_void_nobody_wants_back() -> None:
    life = Life()
    life.batch("a", 16)
    life.now = 20.0
    life.batch("b", 4)
    life.batch("a", 16, corrected_at=5)
    assert life.index.drain_returns() == []


def test_of_users_forgotten_by_both_tiers_nothing_is_known() -> None:
    life = Life(host_pages=0).evicted()
    life.batch("a", 12, save=False)
    assert life.index.drain_returns() == []
