"""What a world around the index remembers: the states each user has, and the jobs in flight on their bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mtserve.cache.keys import extend_chain

Step = Callable[[], None]


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


@dataclass(eq=False)
class Known:
    """What the model says one user has."""

    user: str
    chain: list[int] = field(default_factory=list)
    gpu: int = 0
    host: int = 0

    def cut(self) -> None:
        del self.chain[max(self.gpu, self.host) :]


@dataclass(eq=False)
class Part:
    """One user's part of a job: work on bytes still to do, and what success publishes."""

    known: Known
    tokens: int  # [0, tokens) is valid at the destination after success; corrections lower a copy's
    steps: list[Step]
    verify: Step  # asserts that the bytes are there
    chain: list[int] = field(default_factory=list)  # of a batch's request
    load: Part | None = None  # the load in flight that a batch was begun over
    open: bool = True
    failed: bool = False

    @property
    def loading(self) -> bool:
        return self.load is not None and self.load.open

    @property
    def spoiled(self) -> bool:
        return self.load is not None and self.load.failed

    @property
    def bytes_arrived(self) -> bool:
        return self.load is None or not self.load.steps


@dataclass(eq=False)
class Job:
    kind: str
    ticket: int
    parts: list[Part]

    @property
    def loading(self) -> bool:
        return any(part.loading for part in self.parts)

    def advance(self, steps: int, rng: random.Random) -> None:
        """Does that many steps in any order; those on pages that a load still fills wait for its last."""
        for _ in range(steps):
            ready = [part for part in self.parts if part.steps and part.bytes_arrived]
            if not ready:
                return
            left = rng.choice(ready).steps
            left.pop(rng.randrange(len(left)))()

    def finish(self, rng: random.Random) -> None:
        self.advance(sum(len(part.steps) for part in self.parts), rng)
        assert not any(part.steps for part in self.parts)

    def close(self, success: bool) -> None:
        for part in self.parts:
            part.open, part.failed = False, not success
            part.steps.clear()
