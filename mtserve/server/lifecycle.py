"""From start to signal to a clean end: what `mtserve serve` runs."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mtserve.config import HistoryConfig, ServerConfig
from mtserve.server.backend import Backend
from mtserve.server.server import RankingServer
from mtserve.types import Clock

log = logging.getLogger("mtserve.server")


class Closeable(Protocol):
    def close(self) -> None: ...


async def serve(
    engine: Backend,
    config: ServerConfig,
    *,
    history: Closeable | None = None,
    max_append: int = HistoryConfig.max_append,
    clock: Clock = time.time,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; then drain, and close `engine` and `history`.

    Prints "listening on HOST:PORT" once calls are taken. A second signal, while draining,
    ends the process at once. Raises InvalidArgument when an address cannot be listened on;
    engine and history are closed then too.
    """
    stop = stop or asyncio.Event()
    try:
        server = RankingServer(engine, config, max_append=max_append, clock=clock)
        try:
            address = await server.start()
        except BaseException:
            await server.abandon()
            raise
        with _signals(stop):
            print(f"listening on {address}", flush=True)
            await stop.wait()
        log.info("draining for up to %g s", config.drain_seconds)
        await server.stop()
    finally:
        await asyncio.to_thread(_close, engine, history)


def run(
    engine: Backend,
    config: ServerConfig,
    *,
    history: Closeable | None = None,
    max_append: int = HistoryConfig.max_append,
    clock: Clock = time.time,
) -> None:
    """`serve`, blocking; call it from the main thread, which is where signals arrive."""
    asyncio.run(serve(engine, config, history=history, max_append=max_append, clock=clock))


@contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; after that, and outside, they end the process as usual."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _close(engine: Backend, history: Closeable | None) -> None:
    try:
        engine.close()
    finally:
        if history is not None:
            history.close()
