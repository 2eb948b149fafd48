"""Admission at the door: who is inside, and whether anyone may still come in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from mtserve.errors import Unavailable
from mtserve.metrics import Metrics


class Gate:
    """Counts running calls on one event loop; once closed it refuses new ones."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0
        self.closed = False

    @contextmanager
    def admit(self) -> Iterator[None]:
        """One call. Raises Unavailable once the gate is closed."""
        if self.closed:
            self._metrics.count("rejected_total", label="draining")
            raise Unavailable("the server is draining; ask another replica")
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if self.running == 0:
                self._idle.set()

    def close(self) -> None:
        self.closed = True

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False when `timeout_s` passed first."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
