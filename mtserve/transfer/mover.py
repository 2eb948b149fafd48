"""Moving pages between the tiers. Bytes and streams; what to move, and when, is decided elsewhere.

Who waits for whom is drawn in docs/transfers.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mtserve import _core
from mtserve.cache.index import Copy, PageIds
from mtserve.errors import TransferFailed
from mtserve.kernels.cuda.queue import PageKernel
from mtserve.transfer.pool import poison

LOAD, STORE = "load", "store"

Fault = Callable[[str], None]
"""Called with "load" or "store" before each job; raises TransferFailed to make that one fail (tests, chaos)."""

Ints = npt.NDArray[np.int64]


class Finished(NamedTuple):
    """One job that came to its end, and how it went. `error` is None on success."""

    kind: str
    ticket: int
    error: TransferFailed | None


class Pieces(NamedTuple):
    """How split loads of `pages` pages come: most of them with all their layers, in `parts`, and behind them the last
    `grouped`, group of layers by group. `groups`: first layer of each, of loads from layer 0 on. `run_pages`: neighbouring
    pages that one copy takes, in the mean.
    """

    pages: int
    groups: tuple[int, ...]
    grouped: int
    parts: int
    run_pages: float


class Arrivals(Protocol):
    """What a batch that was begun over loads waits for before it touches their pages."""

    def wait(self) -> None:
        """Block until every byte is there."""
        ...


class Unpacker(Protocol):
    """Makes the states of pages from their packed twins, which are what crosses the link then."""

    states: torch.Tensor
    """The device's states, [pages, layers, ...]: the same pages as those of the mover's pool."""

    @property
    def kernel(self) -> PageKernel | None:
        """What a queue's own thread may run instead; None: nothing."""
        ...

    def unpack(self, pages: PageIds, first: int, last: int, stream: int) -> None:
        """Make the states of layers [first, last) of `pages`: on the raw `stream` of CUDA; on the CPU at once."""
        ...


class Mover(ABC):
    """Copies whole pages between the device pool and the host arena, job by job, each finished exactly once.

    The jobs of one kind end in the order of their submission. `unpacker`, None where the pool has the states
    themselves, is part of every load: whoever owns the mover sets it before the first.
    """

    unpacker: Unpacker | None = None

    def __init__(
        self, pool: torch.Tensor, arena: torch.Tensor, fault: Fault | None = None, *, chunk_pages: int = 0
    ) -> None:
        """`chunk_pages`: no copy may cross a multiple of so many pages of the arena; 0: any may."""
        assert pool.shape[1:] == arena.shape[1:]
        assert pool.dtype == arena.dtype
        assert pool.is_contiguous() and arena.is_contiguous()
        self.pool, self.arena, self.chunk_pages = pool, arena, chunk_pages
        self._fault = fault

    @abstractmethod
    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        """Start copies that were decided together: "load" fills the pool, "store" the arena.

        Nothing else may write the pages they read, or touch those they write, until they have been polled; a batch
        over `arrivals` may.
        """

    @abstractmethod
    def submit_split(self, loads: Sequence[Copy], first_layer: int, pieces: Pieces | None = None) -> Arrivals:
        """Start loads of layers from `first_layer` on, for a batch that makes those before it and begins at once.

        They come together, as `pieces` says, where the caller has asked `split_pieces` before, ahead of what still waits;
        returns what the batch waits for. The pages' earlier layers are left as they are.
        """

    @abstractmethod
    def poll(self) -> list[Finished]:
        """Jobs that have finished since the last call, in order of their end."""

    @abstractmethod
    def pending(self) -> int:
        """Jobs submitted and not yet polled as finished."""

    @abstractmethod
    def wait(self, timeout_s: float = math.inf) -> bool:
        """Block until every submitted job has ended; `poll` then reports them all. False when time ran out first."""

    @abstractmethod
    def load_s(self, size: int) -> float:
        """Seconds in which loads of `size` bytes are expected to be over."""

    def split_pieces(self, loads: Sequence[Copy]) -> Pieces:
        """How `submit_split` would bring these loads, one or more."""
        pages = sum(len(load.gpu_pages) for load in loads)
        return Pieces(pages, (0,), pages, 1, 1.0)

    @abstractmethod
    def near(self, ticket: int) -> bool:
        """Whether a load under way will succeed and has so little left that a batch should start over it."""

    @abstractmethod
    def arrivals(self, tickets: Collection[int]) -> Arrivals:
        """What a batch over these `near` loads waits for."""

    def poison(self, pages: PageIds) -> None:
        """Fill pages of the pool that nobody uses, and their states, with what makes NaN, before anything that is begun
        later touches them.
        """
        self._fill(torch.from_numpy(pages.astype(np.int64)))

    def _fill(self, pages: torch.Tensor) -> None:
        poison(self.pool, pages)
        if self.unpacker is not None:
            poison(self.unpacker.states, pages)

    def _injected(self, kind: str) -> TransferFailed | None:
        """The failure meant for the next job."""
        try:
            if self._fault is not None:
                self._fault(kind)
        except TransferFailed as failure:
            return failure
        return None


class Arrived:
    """Arrivals of what is there already."""

    def wait(self) -> None:
        pass


class SyncMover(Mover):
    """The CPU twin: a job is done when `submit` returns, and told at the next `poll`."""

    def __init__(
        self, pool: torch.Tensor, arena: torch.Tensor, fault: Fault | None = None, *, chunk_pages: int = 0
    ) -> None:
        super().__init__(pool, arena, fault, chunk_pages=chunk_pages)
        self._finished: list[Finished] = []

    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        self._finished += [Finished(kind, copy.ticket, self.attempt(kind, copy)) for copy in copies]

    def submit_split(self, loads: Sequence[Copy], first_layer: int, pieces: Pieces | None = None) -> Arrivals:
        self._finished += [Finished(LOAD, each.ticket, self.attempt(LOAD, each, first_layer)) for each in loads]
        return Arrived()

    def attempt(self, kind: str, copy: Copy, first_layer: int = 0) -> TransferFailed | None:
        """One job, unless it is meant to fail."""
        error = self._injected(kind)
        if error is None:
            self.copy_now(kind, copy, first_layer)
        return error

    def copy_now(self, kind: str, copy: Copy, first_layer: int = 0) -> None:
        """The bytes of one job, of layers from `first_layer` on, and what is made of them."""
        for pool_first, arena_first, count in zip(*runs(copy.gpu_pages, copy.host_pages), strict=True):
            inside = self.pool[pool_first : pool_first + count, first_layer:]
            outside = self.arena[arena_first : arena_first + count, first_layer:]
            target, source = (inside, outside) if kind == LOAD else (outside, inside)
            target.copy_(source)
        if kind == LOAD and self.unpacker is not None:
            self.unpacker.unpack(copy.gpu_pages, first_layer, self.pool.shape[1], stream=0)

    def poll(self) -> list[Finished]:
        finished, self._finished = self._finished, []
        return finished

    def pending(self) -> int:
        return len(self._finished)

    def wait(self, timeout_s: float = math.inf) -> bool:
        return True

    def load_s(self, size: int) -> float:
        return 0.0  # nobody waits for them

    def near(self, ticket: int) -> bool:
        return False  # told as finished at the next poll

    def arrivals(self, tickets: Collection[int]) -> Arrivals:
        raise AssertionError("no load is ever near")


def runs(left: PageIds, right: PageIds, boundary: int = 0) -> tuple[Ints, Ints, Ints]:
    """The longest runs in which both ids rise by one, one piece each: int64 left firsts, right firsts, counts.

    `boundary`: no run crosses a multiple of it on the right; 0: any may.
    """
    found = np.frombuffer(_core._find_runs(left, right, boundary), np.int64).reshape(3, -1)
    return found[0], found[1], found[2]
