"""The part of the CUDA driver that the mover on CUDA calls, on the CPU: what it queues is done when a test says so.

Modelled: streams that work in their order and at their own pace, or not at all; copies whose bytes move only then;
events, and streams that wait for those of others; the refusal of copies that leave the memory registered as one piece; calls that fail when asked to, after they
have queued a part; a clock that only waiting moves. Not modelled: bytes of one copy that come one by one, the driver's
own calls blocking, waits for whole streams (they are noted), and kernels: what torch writes is there at once.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_queue import FakeQueue

from mtserve.kernels.cuda.driver import Addresses
from mtserve.transfer import cuda_mover, lane

CONTEXT = 77  # of the pool's device
OTHER_CONTEXT = 78  # of the device that is current in the caller's thread
LONGEST_S = 5.0  # that a test waits
INVALID, UNKNOWN = 1, 999  # codes of the driver

Kernel = Callable[[Any, int, int], int]
"""(addresses of its parameters, grid, stream) -> the driver's code."""


class FakeStream:
    """Copies in their order; `stuck`: none ends any more."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.stuck = False
        self.done = 0
        self.most_queued = 0  # copies at any time
        self.waited_for: list[FakeStream] = []
        self._queue: deque[tuple[Callable[[], object], FakeEvent | None]] = deque()

    @property
    def queued(self) -> int:
        """Copies that have not been done."""
        return len(self._queue)

    @property
    def end(self) -> int:
        """How many will be done once this stream has come to its present end."""
        return self.done + len(self._queue)

    def push(self, copy: Callable[[], object], after: FakeEvent | None = None) -> None:
        """Queue a copy that waits for `after`, too."""
        self._queue.append((copy, after))
        self.most_queued = max(self.most_queued, len(self._queue))

    def run(self, copies: int | None = None) -> None:
        """Do so many of the oldest copies, as far as none waits for another stream; None: all."""
        for _ in range(0 if self.stuck else len(self._queue) if copies is None else min(copies, len(self._queue))):
            copy, after = self._queue[0]
            if after is not None and not after.passed():
                return
            self._queue.popleft()
            copy()
            self.done += 1

    def run_to(self, place: int) -> None:
        """Do the copies up to a place, and what they wait for on other streams."""
        while self.done < place:
            if self._queue[0][1] is not None:
                self._queue[0][1].synchronize()
            before = self.done
            self.run(1)
            assert self.done > before, "waits for a stream that never ends"

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other)


class FakeEvent:
    """A place on a stream."""

    def __init__(self, driver: FakeDriver, handle: int = 0) -> None:
        self._driver, self.handle = driver, handle
        self._stream: FakeStream | None = None
        self._place = 0

    def record(self, stream: int) -> None:
        assert self.passed(), "used again before the stream came to where it was"
        self._stream = self._driver.streams[stream]
        self._place = self._stream.end

    def hold_back(self, stream: int) -> None:
        """What is queued on `stream` from now on waits for this place, wherever the event is recorded later."""
        place = FakeEvent(self._driver)
        place._stream, place._place = self._stream, self._place
        self._driver.streams[stream].push(lambda: None, after=place)

    def passed(self) -> bool:
        return self._stream is None or self._stream.done >= self._place

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.run_to(self._place)


class FakeDriver:
    """Stands in for the driver, for torch's streams and for the clock, once installed."""

    def __init__(self) -> None:
        self.streams: dict[int, FakeStream] = {}
        self.all_events: dict[int, FakeEvent] = {}  # by handle
        self.kernels: dict[int, Kernel] = {}  # by address
        self.now = 0.0
        self.refuses: Callable[[], bool] = lambda: False  # asked at each call that copies
        self._pieces: list[tuple[int, int]] = []
        self._context = OTHER_CONTEXT
        self._default = self.stream()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._default)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        for name in ("current_context", "use_context"):
            monkeypatch.setattr(cuda_mover, name, getattr(self, name))
        monkeypatch.setattr(lane, "Event", self.event)
        monkeypatch.setattr(lane, "DriverQueue", self.queue)
        monkeypatch.setattr(cuda_mover, "time", self)

    def register(self, memory: torch.Tensor) -> None:
        """`memory` is one piece: no copy may reach beyond it."""
        self._pieces.append((memory.data_ptr(), memory.data_ptr() + memory.nbytes))

    # Of torch and time

    def stream(self, device: torch.device | None = None, priority: int = 0) -> FakeStream:
        stream = FakeStream(len(self.streams) + 1)
        self.streams[stream.cuda_stream] = stream
        return stream

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self._context = self._context, CONTEXT
        yield
        self._context = before

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Meanwhile each stream does a copy."""
        self.now += seconds
        assert self.now < LONGEST_S, "waits for a stream that never ends"
        for stream in self.streams.values():
            stream.run(1)

    # Of the driver

    def event(self) -> FakeEvent:
        assert self._context == CONTEXT
        handle = len(self.all_events) + 1
        self.all_events[handle] = FakeEvent(self, handle)
        return self.all_events[handle]

    def current_context(self) -> int:
        return self._context

    def use_context(self, context: int) -> None:
        assert context == CONTEXT
        self._context = context

    def queue(self, context: int) -> FakeQueue:
        assert context == CONTEXT
        return FakeQueue(self, context)

    def copy_batch(self, to: Addresses, source: Addresses, sizes: Addresses, stream: int) -> int:
        """Queue copies; the code of what went wrong, 0 for none."""
        pieces = list(zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True))
        if not all(self._lies_within(*piece) for piece in pieces):
            return INVALID
        refused = self.refuses()
        for piece in pieces[: len(pieces) // 2] if refused else pieces:
            self.streams[stream].push(_bytes(*piece))
        return UNKNOWN if refused else 0

    def copy_rows(self, to: int, source: int, rows: int, width: int, pitch: int, stream: int) -> int:
        """Likewise, of a strided copy."""
        if not self._lies_within(to, source, (rows - 1) * pitch + width):
            return INVALID
        if self.refuses():
            return UNKNOWN
        copies = [_bytes(to + row * pitch, source + row * pitch, width) for row in range(rows)]
        self.streams[stream].push(lambda: [copy() for copy in copies])
        return 0

    def _lies_within(self, to: int, source: int, size: int) -> bool:
        return size > 0 and all(
            any(begin <= first and first + size <= end for begin, end in self._pieces) for first in (to, source)
        )


def _bytes(to: int, source: int, size: int) -> Callable[[], object]:
    return lambda: ctypes.memmove(to, source, size)
