"""An index with short names for its two-phase calls, for tests that go case by case."""

from __future__ import annotations

import numpy as np

from mtserve.cache.index import TieredIndex
from mtserve.cache.keys import extend_chain

P = 4


def chain_of(tokens) -> np.ndarray:
    chain = np.zeros(len(tokens), np.uint64)
    extend_chain(chain, np.array(tokens, np.int64), 1)
    return chain


class Pool:
    """An index with a clock of its own and short names for the two-phase calls."""

    def __init__(self, gpu: int = 8, host: int = 8, **more) -> None:
        self.index = TieredIndex(P, gpu, host, clock=lambda: 0.0, **more)

    def begin(self, again: bool = False, **chains) -> tuple[int, list[int], list[int], list[list[int]]]:
        rows = len(chains)
        cached, stored, table = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros((rows, 10), np.int32)
        ticket = self.index.begin_batch(list(chains), list(chains.values()), cached, stored, table, [again] * rows)
        self.index.check()
        return ticket, cached.tolist(), stored.tolist(), table.tolist()

    def put(self, success: bool = True, again: bool = False, **chains) -> None:
        self.index.end_batch(self.begin(again, **chains)[0], success)
        self.index.check()

    def store(self, user: str) -> None:
        plan = self.index.begin_store(user)
        assert plan is not None
        self.index.end_store(plan.ticket, True)
        self.index.check()

    def tokens(self) -> dict[str, tuple[int, int]]:
        return {user: (gpu, host) for user, gpu, host in self.index.users()}


A, B = chain_of(range(30)), chain_of(range(100, 130))
