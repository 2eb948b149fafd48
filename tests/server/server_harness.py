"""Runs servers on a thread of their own, so that tests can use the blocking client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mtserve.config import ServerConfig
from mtserve.server.server import RankingServer
from mtserve.types import Clock


class Running:
    """A started server: `target` to call and `stop` to drain it from outside its loop."""

    def __init__(self, engine: Any, options: dict[str, Any], max_append: int, clock: Clock) -> None:
        config = ServerConfig(**{"port": 0, "metrics_port": 0, "drain_seconds": 0.2} | options)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self._call(self._make(engine, config, max_append, clock))
        try:
            self.target = self._call(self.server.start())
        except BaseException:
            self._call(self.server.abandon())
            self._end()
            raise

    async def _make(self, engine: Any, config: ServerConfig, max_append: int, clock: Clock) -> RankingServer:
        return RankingServer(engine, config, max_append=max_append, clock=clock)

    def stop(self) -> bool:
        return bool(self._call(self.server.stop()))

    def close(self) -> None:
        self.stop()
        self._end()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(20)
        self.loop.close()


@contextmanager
def running(engine: Any, max_append: int = 50, clock: Clock = time.time, **options: Any) -> Iterator[Running]:
    server = Running(engine, options, max_append, clock)
    try:
        yield server
    finally:
        server.close()
