"""The mover on CUDA: the copy engines, one stream and one thread that feeds it a direction.

Pieces and calls were chosen by measurement on an H200. `cuMemcpyBatchAsync` moves pages of 1 MiB that lie anywhere at
54 GB/s each way and 46 both ways at once, of which single copies reach 47 and 37 (benchmarks/bench_transfer.py).
Copies of part of a page's layers, strided over a run of pages, reached 51.5 from 2 MiB a piece on in a trial, which no
benchmark repeats.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from mtserve import _core
from mtserve.cache.index import Copy, PageIds
from mtserve.errors import MtserveError
from mtserve.kernels.cuda.driver import Event, current_context, use_context
from mtserve.kernels.cuda.queue import DriverQueue, PageLink
from mtserve.transfer.course import Course
from mtserve.transfer.lane import CopyJob, Lane, Submission
from mtserve.transfer.mover import LOAD, STORE, Fault, Finished, Mover, Pieces

MAX_GROUPS = 4  # of layers, in which a long load comes over an idle link
GROUPED_PIECE_BYTES = 2 << 20  # the least strided piece that keeps the link's rate
# Least of a group of layers, were all pages to come by groups, and of a part of the others: 0.3 ms of the link.
SPLIT_GROUP_BYTES = 16 << 20
# Of the pages of a split load one in so many comes by groups of layers: long enough for the device to encode meanwhile
# what lies behind the groups, while the others come as whole pages at the link's rate. In a trial, of 8 users x 4096
# tokens in runs of 13 pages of 260 KiB: all by groups 3.0 ms, so 2.58, whole 2.59.
GROUPED_SHARE = 4
STRIDED_BYTES = 1 << 20  # of a run, in the mean, from which on a strided copy is worth a call of its own
GROUPED_LOAD_BYTES = 8 << 20  # a shorter load is over so soon that groups of it bring nothing
SUBMISSION_BYTES = 64 << 20  # shorter copies share calls and an event up to here: 1.2 ms of the link
# Given to the driver at once, each way: with a thousand copies waiting in it, its calls begin to block.
QUEUED_BYTES = 512 << 20
ANNOUNCED_BYTES = 16 << 20  # 0.3 ms of the link: what it takes to plan and launch a batch
QUEUED_PAGES = 768  # likewise: each may be a copy of its own
SUBMISSION_PAGES = 256
WAIT_S = 0.00005  # between two looks at what is under way
LINK_BYTES_PER_S = 50e9  # what loads reach beside write-backs, over PCIe 5 x16


@dataclass(frozen=True)
class LayerArrivals:
    """`events[g]` passes when all pages' layers of the g-th group are there, and those of earlier groups.

    Before they are looked at or waited for on the device, `queued` must have returned.
    """

    events: list[Event]
    queue: DriverQueue
    ticket: int | None  # None: the driver has all of it

    def queued(self) -> None:
        """Block until the driver has all of it."""
        if self.ticket is not None:
            self.queue.wait(self.ticket)

    def wait(self) -> None:
        self.queued()
        self.events[-1].synchronize()


@cache
def layer_groups(layers: int, groups: int = MAX_GROUPS) -> tuple[int, ...]:
    """The first layer of each group in which long loads come."""
    groups = min(groups, layers)
    return tuple(group * layers // groups for group in range(groups))


def load_parts(pages: int, page_bytes: int, *, unpacked: bool) -> int:
    """In which so many pages with all their layers come: what is unpacked begins with the first."""
    return max(1, min(MAX_GROUPS, pages * page_bytes // SPLIT_GROUP_BYTES)) if unpacked else 1


def split_course(layers: int, pages: int, page_bytes: int, *, unpacked: bool) -> tuple[tuple[int, ...], int, int]:
    """(`groups`, `grouped`, `parts`), as in `Pieces`, of split loads of so many pages, 1 or more."""
    groups = layer_groups(layers, max(1, min(MAX_GROUPS, pages * page_bytes // SPLIT_GROUP_BYTES)))
    grouped = pages if len(groups) == 1 else -(-pages // GROUPED_SHARE)
    return groups, grouped, load_parts(pages - grouped, page_bytes, unpacked=unpacked)


class CudaMover(Mover):
    """Copies on two streams of their own, one a direction.

    They wait for nothing on the device: pages are freed, and states are committed, only once the host has seen the
    work on them done. What reads a load's pages waits for its events.
    """

    def __init__(
        self, pool: torch.Tensor, arena: torch.Tensor, fault: Fault | None = None, *, chunk_pages: int = 0
    ) -> None:
        super().__init__(pool, arena, fault, chunk_pages=chunk_pages)
        with torch.cuda.device(pool.device):  # the caller's thread may have another
            self._context = current_context()
        self._lanes = {kind: Lane(kind, pool.device, self._context) for kind in (LOAD, STORE)}
        self._poisoning = torch.cuda.Stream(pool.device)
        self._unpacking = torch.cuda.Stream(pool.device, priority=-1)  # a batch waits for it, or soon will
        self._loads: dict[int, Submission] = {}  # by ticket, those that the driver has
        self._finished: list[Finished] = []
        self._page_bytes = pool[:1].nbytes
        self._layers = pool.shape[1]
        self._link = PageLink(
            pool=pool.data_ptr(), pool_pages=len(pool), arena=arena.data_ptr(), arena_pages=len(arena), layers=self._layers,
            layer_bytes=self._page_bytes // self._layers, chunk_pages=chunk_pages, strided_bytes=STRIDED_BYTES,
        )  # fmt: skip
        self._groups = layer_groups(self._layers)

    def submit(self, kind: str, copies: Sequence[Copy]) -> None:
        use_context(self._context)  # the caller's thread need not have called CUDA before
        self._lanes[kind].waiting.extend(self._submissions(kind, self._jobs(kind, copies)))
        self._feed()

    def submit_split(self, loads: Sequence[Copy], first_layer: int, pieces: Pieces | None = None) -> LayerArrivals:
        use_context(self._context)
        jobs, pieces = self._jobs(LOAD, loads), pieces or self.split_pieces(loads)
        size = sum(map(self._size, jobs)) * (self._layers - first_layer) // self._layers
        firsts = (first_layer, *(first for first in pieces.groups if first > first_layer))
        self._begin(self._lanes[LOAD], Submission(jobs, size, firsts, pieces.grouped if len(firsts) > 1 else None))
        return self._arrivals(self._lanes[LOAD].under_way[-1])

    def _jobs(self, kind: str, copies: Sequence[Copy]) -> list[CopyJob]:
        return [CopyJob(copy, self._injected(kind)) for copy in copies]

    def _submissions(self, kind: str, jobs: Sequence[CopyJob]) -> Iterator[Submission]:
        """Neighbours in `jobs` together; a long load by itself, so that its user waits for no other."""
        together: list[CopyJob] = []
        size = pages = 0
        for job in jobs:
            alone = kind == LOAD and self._size(job) >= GROUPED_LOAD_BYTES
            pages += len(job.copy.gpu_pages)
            if together and (alone or size >= SUBMISSION_BYTES or pages > SUBMISSION_PAGES):
                yield Submission(together, size)
                together, size, pages = [], 0, len(job.copy.gpu_pages)
            together.append(job)
            size += self._size(job)
            if alone:
                yield Submission(together, size)
                together, size, pages = [], 0, 0
        if together:
            yield Submission(together, size)

    def _size(self, job: CopyJob) -> int:
        return len(job.copy.gpu_pages) * self._page_bytes

    def _feed(self) -> None:
        """Give the driver what it has room for, and always something."""
        most = min(QUEUED_BYTES, QUEUED_PAGES * self._page_bytes)
        for kind, lane in self._lanes.items():
            while lane.waiting and (not lane.under_way or lane.queued_bytes + lane.waiting[0].size <= most):
                submission = lane.waiting.popleft()
                # Behind others a load waits anyway; whole pages are a little faster.
                if kind == LOAD and not lane.under_way and submission.size >= GROUPED_LOAD_BYTES:
                    submission.firsts = self._groups_of(submission)
                self._begin(lane, submission)

    def _begin(self, lane: Lane, submission: Submission) -> None:
        """Give the driver one submission."""
        course = self._course(lane, submission)
        try:
            if submission.firsts == (0,):
                self._copy_whole(course, submission)
            else:
                self._load_by_groups(course, submission)
            course.queue()
        except (MtserveError, RuntimeError) as failure:  # the unpacker's, or torch's, which wants memory for it
            submission.fail(lane.kind, failure)
            course = self._course(lane, submission)
            submission.break_off(course.bring(0, 0, (0, 0)))
            course.queue()
        lane.submit(submission)
        if lane.kind == LOAD:
            self._loads.update((job.copy.ticket, submission) for job in submission.jobs)

    def _course(self, lane: Lane, submission: Submission) -> Course:
        return Course(lane, self._link, submission, self.unpacker, self._unpacking.cuda_stream)

    def _copy_whole(self, course: Course, submission: Submission) -> None:
        """All layers of the jobs' pages, but those of jobs that are to fail."""
        layers, cut = (0, self._layers), 0
        if course.loads and submission.size >= 2 * ANNOUNCED_BYTES:
            cut = max(0, course.pages - ANNOUNCED_BYTES // self._page_bytes)
        if cut:
            submission.announced = course.announce(0, cut, layers)
        submission.events.append(course.bring(cut, course.pages, layers, made_from=0))

    def _groups_of(self, submission: Submission) -> tuple[int, ...]:
        """The first layers of the groups in which a load comes: one alone, whose pages lie in runs long enough."""
        job = submission.jobs[0]
        if len(submission.jobs) > 1 or job.error is not None:
            return (0,)
        groups, run_pages = len(self._groups), self._run_pages([job.copy], len(job.copy.gpu_pages))
        while groups > 1 and run_pages * self._page_bytes < GROUPED_PIECE_BYTES * groups:
            groups //= 2
        return layer_groups(self._layers, groups)

    def _load_by_groups(self, course: Course, submission: Submission) -> None:
        """Loads whose last pages' layers come group by group, those of all jobs together."""
        bulk = 0 if submission.grouped is None else max(0, course.pages - submission.grouped)
        if bulk:
            self._load_bulk(course, submission, bulk)
        for layers in pairwise((*submission.firsts, self._layers)):
            submission.events.append(course.bring(bulk, course.pages, layers))
        submission.announced = submission.events[(len(submission.events) - 1) // 2]

    def _load_bulk(self, course: Course, submission: Submission, pages: int) -> None:
        """All layers of the first `pages`, which come before those that come by groups."""
        layers = submission.firsts[0], self._layers
        if self.unpacker is None:
            course.copy(0, pages, layers)
            return
        parts = load_parts(pages, self._page_bytes, unpacked=True)
        for begin, end in pairwise(part * pages // parts for part in range(parts + 1)):
            submission.others.append(course.bring(begin, end, layers))

    def poison(self, pages: PageIds) -> None:
        """On a stream of its own that waits for nobody: what still uses those pages against the rules will show."""
        with torch.cuda.stream(self._poisoning):
            self._fill(torch.from_numpy(pages.astype(np.int64)).to(self.pool.device))
        lanes = (lane.stream for lane in self._lanes.values())
        for stream in (torch.cuda.current_stream(self.pool.device), self._unpacking, *lanes):
            stream.wait_stream(self._poisoning)

    def poll(self) -> list[Finished]:
        use_context(self._context)
        self._retire()
        self._feed()
        finished, self._finished = self._finished, []
        return finished

    def _retire(self) -> None:
        """Note what has ended."""
        for kind, lane in self._lanes.items():
            for submission in lane.retire():
                self._finished += [Finished(kind, job.copy.ticket, job.error) for job in submission.jobs]
                if kind == LOAD:
                    for job in submission.jobs:
                        self._loads.pop(job.copy.ticket, None)

    def pending(self) -> int:
        return sum(lane.jobs for lane in self._lanes.values()) + len(self._finished)

    def wait(self, timeout_s: float = math.inf) -> bool:
        use_context(self._context)
        end = time.monotonic() + timeout_s
        while True:
            self._retire()
            self._feed()
            busy = [lane for lane in self._lanes.values() if lane.under_way]
            if not busy:
                return True
            if time.monotonic() > end:
                return False
            if timeout_s < math.inf:
                time.sleep(WAIT_S)
            else:
                busy[0].wait()

    def load_s(self, size: int) -> float:
        return size / LINK_BYTES_PER_S

    def split_pieces(self, loads: Sequence[Copy]) -> Pieces:
        pages = sum([len(load.gpu_pages) for load in loads])
        course = split_course(self._layers, pages, self._page_bytes, unpacked=self.unpacker is not None)
        return Pieces(pages, *course, self._run_pages(loads, pages))

    def _run_pages(self, copies: Sequence[Copy], pages: int) -> float:
        """Neighbouring pages, of so many of copies one behind the other, that one copy of the driver's takes, in the mean."""
        sides = [copy.gpu_pages for copy in copies], [copy.host_pages for copy in copies]
        return pages / _core._count_runs(*sides, self.chunk_pages)

    def near(self, ticket: int) -> bool:
        lane, submission = self._lanes[LOAD], self._loads.get(ticket)
        if submission is None or submission is not lane.under_way[0] or submission.announced is None:
            return False
        if not lane.settled(submission):
            return False
        good = all(job.error is None for job in submission.jobs if job.copy.ticket == ticket)
        return good and submission.announced.passed()

    def arrivals(self, tickets: Collection[int]) -> LayerArrivals:
        submissions = [self._loads[ticket] for ticket in tickets]
        # The stream's earlier ones come before it.
        return self._arrivals(max(submissions, key=self._lanes[LOAD].under_way.index))

    def _arrivals(self, last: Submission) -> LayerArrivals:
        ends = (*self._groups[1:], self._layers)
        # Of each group the last piece that begins before its end.
        pieces = [max(0, bisect_left(last.firsts, end) - 1) for end in ends]
        ticket = last.tickets[-1] if last.tickets else None
        return LayerArrivals([last.events[piece] for piece in pieces], self._lanes[LOAD].queue, ticket)
