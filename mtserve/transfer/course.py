"""What the driver is asked to do for one submission: which layers of which pages come when, and what is made of them."""

from __future__ import annotations

import numpy as np

from mtserve.kernels.cuda.driver import Event
from mtserve.kernels.cuda.queue import PageLink
from mtserve.transfer.lane import Lane, Submission
from mtserve.transfer.mover import LOAD, Unpacker

Layers = tuple[int, int]
"""First, and behind the last."""


class Course:
    """Steps in the order in which they are added; `queue` hands them to the lane's queue.

    Pages are named by their place in the list of the submission's pages, `pages` in all, but those of jobs that are to fail.
    `unpacker`: makes states of what loads bring, on the raw `make_stream`; None: they are the states.
    """

    def __init__(
        self, lane: Lane, link: PageLink, submission: Submission, unpacker: Unpacker | None, make_stream: int
    ) -> None:
        self._lane, self._link, self._submission = lane, link, submission
        self._gpu_pages, self._host_pages = submission.pages()
        self.loads = lane.kind == LOAD
        self._unpacker, self._make_stream = unpacker if self.loads else None, make_stream
        self._steps: list[int] = []
        submission.unpacker = self._unpacker
        self.pages = sum(map(len, self._gpu_pages))

    def copy(self, begin: int, end: int, layers: Layers) -> None:
        """Copy layers of pages [begin, end)."""
        self._steps += (begin, end, *layers, 0, 0, 0, 0)

    def announce(self, begin: int, end: int, layers: Layers) -> Event:
        """Likewise; what passes when the bytes are there."""
        copied = self._lane.event()
        self._submission.others.append(copied)
        self._steps += (begin, end, *layers, copied.handle, 0, 0, 0)
        return copied

    def bring(self, begin: int, end: int, layers: Layers, made_from: int | None = None) -> Event:
        """Copy, and make states of all pages from `made_from` (None: `begin`) to `end`.

        What passes when they are there; of a load not before those of earlier ones.
        """
        made_from = begin if made_from is None else made_from
        if self._unpacker is None:
            copied = self._lane.event()
            self._steps += (begin, end, *layers, copied.handle, 0, 0, 0)
            return copied
        if self._unpacker.kernel is None and end > made_from:
            return self._bring_now(self._unpacker, begin, end, layers, made_from)
        copied, made = self._lane.event(), self._lane.event()
        self._submission.others.append(copied)
        self._steps += (begin, end, *layers, copied.handle, made_from, end, made.handle)
        return made

    def _bring_now(self, unpacker: Unpacker, begin: int, end: int, layers: Layers, made_from: int) -> Event:
        """By an unpacker that no queue can run: the loop launches it, once the driver has all that it waits for."""
        copied, lane = self.announce(begin, end, layers), self._lane
        self.queue()
        lane.queue.hold_back(self._make_stream, copied)
        lane.flush(self._submission)
        unpacker.unpack(np.concatenate(self._gpu_pages)[made_from:end], *layers, self._make_stream)
        made = lane.event()
        lane.queue.record(made, self._make_stream)
        return made

    def queue(self) -> None:
        """Add the steps so far to the lane's queue. Raises InvalidArgument for pages that there are not."""
        steps, self._steps = self._steps, []
        kernel = None if self._unpacker is None else self._unpacker.kernel
        self._lane.queue.move(
            self._link, self.loads, self._gpu_pages, self._host_pages, steps, self._lane.raw_stream,
            self._make_stream, kernel,
        )  # fmt: skip
