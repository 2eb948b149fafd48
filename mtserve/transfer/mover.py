"""Moving pages between the tiers. Bytes and streams; what to move, and when, is decided elsewhere.

Who waits for whom, on CUDA:

    onload      waits for the compute stream as of its start: its target pages may have had a reader
    compute     waits for an onload before the first batch that uses its pages
    write-back  waits for the compute stream as of its start: the forward wrote its source pages
    reuse of a page or of an arena slot: only after its job has been polled as finished
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mtserve.cache.index import Copy
from mtserve.errors import TransferFailed

LOAD, STORE = "load", "store"

Fault = Callable[[str], None]
"""Called with "load" or "store" before each job; raises TransferFailed to make that one fail (tests, chaos)."""


@dataclass(frozen=True)
class Finished:
    """One job that came to its end, and how it went. `error` is None on success."""

    kind: str
    ticket: int
    error: TransferFailed | None


class Mover(ABC):
    """Copies whole pages between the device pool and the host arena, job by job, each finished exactly once."""

    def __init__(self, pool: torch.Tensor, arena: torch.Tensor, fault: Fault | None = None) -> None:
        assert pool.shape[1:] == arena.shape[1:]
        assert pool.dtype == arena.dtype
        assert pool.is_contiguous() and arena.is_contiguous()
        self.pool, self.arena = pool, arena
        self._fault = fault

    @abstractmethod
    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        """Start copies that were decided together: "load" fills the pool, "store" the arena."""

    @abstractmethod
    def poll(self) -> list[Finished]:
        """Jobs that have finished since the last call, in order of their end."""

    @abstractmethod
    def pending(self) -> int:
        """Jobs submitted and not yet polled as finished."""

    @abstractmethod
    def wait(self) -> None:
        """Block until every submitted job has ended; `poll` then reports them all."""

    def copy_now(self, kind: str, copy: Copy) -> None:
        """Copy the bytes of one job, on the current stream."""
        for pool_first, arena_first, count in runs(copy.gpu_pages, copy.host_pages):
            inside = self.pool[pool_first : pool_first + count]
            outside = self.arena[arena_first : arena_first + count]
            target, source = (inside, outside) if kind == LOAD else (outside, inside)
            target.copy_(source, non_blocking=True)

    def _attempt(self, kind: str, copy: Copy) -> TransferFailed | None:
        """`copy_now`; what went wrong."""
        try:
            if self._fault is not None:
                self._fault(kind)
            self.copy_now(kind, copy)
        except TransferFailed as failure:
            return failure
        return None


class SyncMover(Mover):
    """The CPU twin: a job is done when `submit` returns, and told at the next `poll`."""

    def __init__(self, pool: torch.Tensor, arena: torch.Tensor, fault: Fault | None = None) -> None:
        super().__init__(pool, arena, fault)
        self._finished: list[Finished] = []

    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        self._finished += [Finished(kind, copy.ticket, self._attempt(kind, copy)) for copy in copies]

    def poll(self) -> list[Finished]:
        finished, self._finished = self._finished, []
        return finished

    def pending(self) -> int:
        return len(self._finished)

    def wait(self) -> None:
        return


@dataclass(frozen=True)
class _Job:
    kind: str
    ticket: int
    done: torch.cuda.Event
    error: TransferFailed | None


class CudaMover(Mover):
    """Copies on two streams of their own, one a direction, ordered against the compute stream by events.

    Copies submitted together wait for the compute stream once; each ends on an event of its own.
    """

    def __init__(self, pool: torch.Tensor, arena: torch.Tensor, fault: Fault | None = None) -> None:
        super().__init__(pool, arena, fault)
        self._streams = {kind: torch.cuda.Stream(pool.device) for kind in (LOAD, STORE)}
        self._jobs: list[_Job] = []

    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        stream = self._streams[kind]
        stream.wait_stream(torch.cuda.current_stream(self.pool.device))
        with torch.cuda.stream(stream):
            for copy in copies:
                error = self._attempt(kind, copy)
                done = torch.cuda.Event()
                done.record(stream)
                self._jobs.append(_Job(kind, copy.ticket, done, error))

    def copy_now(self, kind: str, copy: Copy) -> None:
        try:
            super().copy_now(kind, copy)
        except RuntimeError as failure:
            raise TransferFailed(f"{kind} of {len(copy.gpu_pages)} pages: {failure}") from None

    def poll(self) -> list[Finished]:
        ended = [job for job in self._jobs if job.done.query()]
        self._jobs = [job for job in self._jobs if job not in ended]
        for job in ended:
            torch.cuda.current_stream(self.pool.device).wait_event(job.done)
        return [Finished(job.kind, job.ticket, job.error) for job in ended]

    def pending(self) -> int:
        return len(self._jobs)

    def wait(self) -> None:
        for job in self._jobs:
            job.done.synchronize()


def make_mover(pool: torch.Tensor, arena: torch.Tensor, fault: Fault | None = None) -> Mover:
    """The mover for the pool's device."""
    return (CudaMover if pool.is_cuda else SyncMover)(pool, arena, fault)


def runs(left: npt.NDArray[np.int32], right: npt.NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """(left first, right first, count) of the longest runs in which both ids rise by one: one copy each."""
    assert len(left) == len(right)
    if len(left) == 0:
        return []
    breaks = np.flatnonzero((np.diff(left) != 1) | (np.diff(right) != 1)) + 1
    firsts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((firsts, [len(left)])))
    return [(int(left[i]), int(right[i]), int(count)) for i, count in zip(firsts, counts, strict=True)]
