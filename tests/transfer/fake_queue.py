"""The thread that feeds the driver, without the thread: calls are made as they are added, or when a test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mtserve.kernels.cuda.driver import Addresses, CudaError

if TYPE_CHECKING:
    from fake_driver import FakeDriver


class FakeQueue:
    """As DriverQueue. `late`: lists are worked off only by `work`, or by who waits for them."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver
        self.late = False
        self._list: list[tuple[Callable[[], Any], bool]] = []
        self._waiting: deque[list[tuple[Callable[[], Any], bool]]] = deque()
        self._submitted = self._done = 0
        self._errors: dict[int, CudaError] = {}

    def copy_batch(self, to: Addresses, source: Addresses, sizes: Addresses, stream: int) -> None:
        self._list.append((lambda: self._driver.copy_batch(to, source, sizes, stream), False))

    def copy_strided(
        self, to: Addresses, source: Addresses, rows: Addresses, width: int, pitch: int, stream: int
    ) -> None:
        self._list.append((lambda: self._driver.copy_strided(to, source, rows, width, pitch, stream), False))

    def record(self, event: Any, stream: int) -> None:
        self._list.append((lambda: event.record(stream), True))

    def hold_back(self, stream: int, event: Any) -> None:
        self._list.append((lambda: event.hold_back(stream), True))

    def launch(self, launch: Callable[[int, int], None], grid: int, stream: int) -> None:
        self._list.append((lambda: launch(grid, stream), False))

    def submit(self) -> int:
        self._waiting.append(self._list)
        self._list = []
        self._submitted += 1
        if not self.late:
            self.work()
        return self._submitted

    def work(self, lists: int | None = None) -> None:
        """Make the calls of so many of the oldest lists; None: of all."""
        for calls in [self._waiting.popleft() for _ in range(len(self._waiting))[:lists]]:
            self._done += 1
            failed = None
            for call, always in calls:
                if failed is not None and not always:
                    continue
                try:
                    call()
                except CudaError as error:
                    failed = failed or error
            if failed is not None:
                self._errors[self._done] = failed

    def over(self, ticket: int) -> bool:
        return self._done >= ticket

    def wait(self, ticket: int) -> None:
        if not self.over(ticket):
            self.work()

    def take_error(self, ticket: int) -> CudaError | None:
        assert self.over(ticket)
        return self._errors.pop(ticket, None)
