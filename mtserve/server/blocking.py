"""Threads for the engine's blocking calls, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from mtserve.errors import ResourceExhausted

P = ParamSpec("P")
T = TypeVar("T")


class Blocking:
    """Runs calls on `threads` threads; of those waiting or running there are at most `limit`.

    `name` says in errors what is full.
    """

    def __init__(self, name: str, *, threads: int, limit: int) -> None:
        self._name = name
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"mtserve-{name}")
        self._places = threading.BoundedSemaphore(limit)
        self._limit = limit

    async def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work`. When cancelled, a call not started never runs; one started runs to its end.

        Raises ResourceExhausted at once when `limit` calls are already here.
        """
        return await asyncio.wrap_future(self.start(work, *args, **kwargs))

    def start(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """`call`, for callers that outlive the wait."""
        if not self._places.acquire(blocking=False):
            raise ResourceExhausted(f"{self._limit} calls are waiting already", field=self._name)
        future = self._pool.submit(work, *args, **kwargs)
        future.add_done_callback(self._leave)
        return future

    def _leave(self, _: Future[Any]) -> None:
        self._places.release()

    def close(self) -> None:
        """Wait for the calls that run and drop those that have not started."""
        self._pool.shutdown(wait=True, cancel_futures=True)
