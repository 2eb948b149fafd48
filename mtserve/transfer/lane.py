"""One direction of the mover on CUDA: copies that end together, and those that the driver has been given."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from mtserve.cache.index import Copy, PageIds
from mtserve.errors import TransferFailed
from mtserve.kernels.cuda.driver import Event
from mtserve.kernels.cuda.queue import DriverQueue
from mtserve.transfer.mover import Unpacker


@dataclass
class CopyJob:
    """One copy; `error` is why it failed or is to fail, None as long as nothing is known against it."""

    copy: Copy
    error: TransferFailed | None


@dataclass(eq=False)
class Submission:
    """Jobs that end together: on the last of `events`, one for each group of layers, in the order of the stream.

    `firsts`: the first layer of each group. `grouped`: of the pages the last, so many of which alone come by groups, the
    others with all their layers before them; None: all come by groups. `tickets`: of the calls that queue them, before
    whose end the events mean nothing; none once they have ended. `announced` passes when so little of a load is left that
    a batch should start over it; None where all of it is little. `others`: its events beside `events`. `unpacker`: whose
    memory the device reads until the end.
    """

    jobs: list[CopyJob]
    size: int
    firsts: tuple[int, ...] = (0,)
    grouped: int | None = None
    events: list[Event] = field(default_factory=list)
    others: list[Event] = field(default_factory=list)
    announced: Event | None = None
    tickets: list[int] = field(default_factory=list)
    unpacker: Unpacker | None = None

    def pages(self) -> tuple[list[PageIds], list[PageIds]]:
        """Pages of the pool and their twins of the arena, of each job but those that are to fail."""
        good = [job.copy for job in self.jobs if job.error is None]
        return [copy.gpu_pages for copy in good], [copy.host_pages for copy in good]

    def fail(self, kind: str, failure: Exception) -> None:
        """None of the jobs succeeds; what was known against one before stays."""
        for job in self.jobs:
            if job.error is None:
                job.error = TransferFailed(f"{kind} of {len(job.copy.gpu_pages)} pages: {failure}")

    def break_off(self, end: Event) -> None:
        """No more of it is queued than was by now, and it ends on `end` as a whole."""
        self.others += self.events
        self.events, self.firsts, self.announced = [end], self.firsts[:1], None


class Lane:
    """One direction: its stream, who feeds it, what the driver has of it, and what waits behind that."""

    def __init__(self, kind: str, device: torch.device, context: int) -> None:
        self.kind = kind
        self.stream = torch.cuda.Stream(device)
        self.queue = DriverQueue(context)
        self.under_way: deque[Submission] = deque()
        self.waiting: deque[Submission] = deque()
        self.queued_bytes = 0
        self._free: list[Event] = []

    @property
    def jobs(self) -> int:
        """Those under way or waiting."""
        return sum(len(each.jobs) for each in (*self.under_way, *self.waiting))

    @property
    def raw_stream(self) -> int:
        return self.stream.cuda_stream

    def event(self) -> Event:
        """One that nobody waits for."""
        return self._free.pop() if self._free else Event()

    def submit(self, submission: Submission) -> None:
        """Hand over the calls that queue it; it counts as under way from now on."""
        self.begin(submission)
        self.under_way.append(submission)
        self.queued_bytes += submission.size

    def begin(self, submission: Submission) -> None:
        """Hand over the calls so far; more may follow."""
        submission.tickets.append(self.queue.submit())

    def flush(self, submission: Submission) -> None:
        """Likewise, and block until they have been made."""
        self.begin(submission)
        self.queue.wait(submission.tickets[-1])
        self.settled(submission)

    def settled(self, submission: Submission) -> bool:
        """Whether the driver has all of a submission, and its jobs know if it took it."""
        if submission.tickets and self.queue.over(submission.tickets[-1]):
            failures = [self.queue.take_error(ticket) for ticket in submission.tickets]
            submission.tickets.clear()
            for failure in failures:
                if failure is not None:
                    submission.fail(self.kind, failure)
        return not submission.tickets

    def retire(self) -> Iterator[Submission]:
        """Those that have ended since; their events are used again."""
        while self.under_way and self.settled(self.under_way[0]) and self.under_way[0].events[-1].passed():
            submission = self.under_way.popleft()
            self.queued_bytes -= submission.size
            self._free += submission.events + submission.others
            yield submission

    def wait(self) -> None:
        """Block until the oldest that is under way has ended."""
        if self.under_way[0].tickets:
            self.queue.wait(self.under_way[0].tickets[-1])
        self.under_way[0].events[-1].synchronize()
