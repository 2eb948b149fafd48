"""The thread that feeds the driver, over functions that stand in for the driver's; lists are handed to it when a test says so.

The lists themselves are the real queue's, each of a queue of its own: what it makes of pages and layers is what is tested.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mtserve import _core
from mtserve.kernels.cuda.driver import CudaError

if TYPE_CHECKING:
    from fake_driver import FakeDriver

P, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
COPY_2D_WORDS = 16  # of CUDA_MEMCPY2D, 8 bytes each
SOURCE, SOURCE_PITCH, TO, TO_PITCH, WIDTH, ROWS = 4, 6, 11, 13, 14, 15  # of these


# Queues' threads may outlive what a test still holds, and the collector may run in them.
ALIVE: list[DriverFunctions] = []
# Called by a queue's thread as it begins, perhaps while who ends it keeps the interpreter's lock: of C, and harmless.
SET_CONTEXT = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value or 0


class DriverFunctions:
    """What a queue is given instead of the driver's functions; `broken`: what went wrong in them."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver
        self.broken: list[BaseException] = []
        ALIVE.append(self)
        kinds: dict[str, tuple[Any, ...]] = {
            "copy": (P, P, SIZE, P), "copy_batch": (P, P, P, SIZE, P, P, SIZE, P),
            "copy_2d": (P, P), "record": (P, P), "wait_event": (P, P, ctypes.c_uint), "launch": (P, P, ctypes.POINTER(P), P),
        }  # fmt: skip
        self._kept = {name: ctypes.CFUNCTYPE(INT, *kind)(self._guarded(name)) for name, kind in kinds.items()}

    def queue(self, context: int) -> _core._DriverQueue:
        addresses = {name: ctypes.cast(each, P).value or 0 for name, each in self._kept.items()}
        return _core._DriverQueue(set_context=SET_CONTEXT, **addresses, batch_reports_failed=False, context=context)

    def _guarded(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            try:
                return int(getattr(self, name)(*arguments) or 0)
            except BaseException as error:  # the thread is not ours: `FakeQueue.work` raises it
                self.broken.append(error)
                return 1

        return call

    def copy_batch(self, to: int, source: int, sizes: int, count: int, attributes: int, used_from: int, used: int, stream: int) -> int:  # fmt: skip
        lists = [np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(each)) for each in (to, source, sizes)]
        return self._driver.copy_batch(*lists, stream)

    def copy_2d(self, shape: int, stream: int) -> int:
        words = (ctypes.c_int64 * COPY_2D_WORDS).from_address(shape)
        assert words[SOURCE_PITCH] == words[TO_PITCH]
        return self._driver.copy_rows(words[TO], words[SOURCE], words[ROWS], words[WIDTH], words[TO_PITCH], stream)

    def record(self, event: int, stream: int) -> None:
        self._driver.all_events[event].record(stream)

    def wait_event(self, stream: int, event: int, flags: int) -> None:
        assert flags == 0
        self._driver.all_events[event].hold_back(stream)

    def launch(self, config: int, function: int, parameters: Any, extra: int | None) -> int:
        grid, stream = ctypes.c_uint32.from_address(config).value, ctypes.c_uint64.from_address(config + 32).value
        return self._driver.kernels[function](parameters, grid, stream)


class FakeQueue:
    """As DriverQueue. `late`: lists are worked off only by `work`, or by who waits for them."""

    def __init__(self, driver: FakeDriver, context: int) -> None:
        self._functions, self._context = DriverFunctions(driver), context
        self.late = False
        self._list = self._functions.queue(context)
        self._waiting: deque[_core._DriverQueue] = deque()
        self._submitted = self._done = 0
        self._errors: dict[int, CudaError] = {}

    def move(self, *arguments: Any) -> None:
        self._list.move(*arguments)

    def record(self, event: Any, stream: int) -> None:
        self._list.record(event.handle, stream)

    def hold_back(self, stream: int, event: Any) -> None:
        self._list.hold_back(stream, event.handle)

    def submit(self) -> int:
        self._waiting.append(self._list)
        self._list = self._functions.queue(self._context)
        self._submitted += 1
        if not self.late:
            self.work()
        return self._submitted

    def work(self, lists: int | None = None) -> None:
        """Make the calls of so many of the oldest lists; None: of all."""
        for queue in [self._waiting.popleft() for _ in range(len(self._waiting))[:lists]]:
            self._done += 1
            ticket = queue.submit()
            queue.wait(ticket)
            if self._functions.broken:
                raise self._functions.broken[0]
            failed = queue.take_failure(ticket)
            if failed is not None:
                name, code = failed
                self._errors[self._done] = CudaError(f"error {code}: unknown error", field=name)

    def over(self, ticket: int) -> bool:
        return self._done >= ticket

    def wait(self, ticket: int) -> None:
        if not self.over(ticket):
            self.work()

    def take_error(self, ticket: int) -> CudaError | None:
        assert self.over(ticket)
        return self._errors.pop(ticket, None)
