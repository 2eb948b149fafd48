"""A fake engine, servers around it, and clients of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fake_engine import FakeEngine
from server_harness import Running, running

from mtserve.server.client import Client


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Start servers that end with the test."""
    with ExitStack() as stack:
        yield lambda engine, **options: stack.enter_context(running(engine, **options))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine, serve: Callable[..., Running]) -> Iterator[Client]:
    with Client(serve(engine).target, timeout_s=10) as client:
        yield client


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end, "still not so after 5 s"
            time.sleep(0.005)

    return wait
