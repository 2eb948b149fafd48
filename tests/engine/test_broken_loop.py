"""What nothing can repair ends the loop: whoever waits is answered, and what was taken is given back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import pytest
from engine_world import World
from restored_worlds import deep_world, on_the_host

from mtserve.errors import Unavailable
from mtserve.kernels.cuda.driver import CudaError
from mtserve.transfer.arena import HostArena

Make = Callable[..., World]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def _device_is_gone(*_: object, **__: object) -> NoReturn:
    raise CudaError("error 700: an illegal memory access was encountered", field="cuStreamSynchronize")


def test_a_batch_that_neither_starts_nor_settles_is_answered(world: Make) -> None:
    w = world(start=True)
    w.put("a", 5)
    w.put("b", 5)
    w.engine._core.served.runner.start = w.engine._core.served.runner.settle = _device_is_gone  # type: ignore[method-assign]
    pending = w.submit("a")
    with pytest.raises(CudaError, match="700"):
        pending.future.result(10)
    assert w.engine._loop._thread is not None
    w.engine._loop._thread.join(10)
    assert w.engine._loop.state == "broken"
    with pytest.raises(Unavailable, match="broken"):
        w.submit("b")
    assert w.tiers.index.stats().batches_in_flight == 0
    assert w.value("requests_in_flight") == 0
    w.engine.close()  # does not wait for ever


def test_the_batch_before_one_that_neither_starts_nor_settles_is_answered(world: Make) -> None:
    w = world()
    w.put("a", 5)
    w.put("b", 5)
    w.overlap()
    before = w.submit("a")
    w.step()
    w.engine._core.served.runner.start = w.engine._core.served.runner.settle = _device_is_gone  # type: ignore[method-assign]
    broken = w.submit("b")
    with pytest.raises(CudaError):
        w.step()
    w.engine.close()
    before.verify()
    assert isinstance(broken.future.exception(0), CudaError)


@pytest.mark.parametrize("times", [1, 2])
def test_a_batch_whose_pages_cannot_be_released_is_answered_and_so_is_the_one_behind_it(
    world: Make, times: int
) -> None:
    w = world()
    w.put("a", 5)
    w.put("b", 5)
    w.overlap()
    release, left = w.tiers.release, [times]

    def broken(*arguments: Any, **options: Any) -> list[str]:
        if not left[0]:
            return release(*arguments, **options)
        left[0] -= 1
        _device_is_gone()

    w.tiers.release = broken
    first = w.submit("a")
    w.step()
    second = w.submit("b")
    with pytest.raises(CudaError):
        w.step()  # launches b's, then ends a's
    assert isinstance(first.future.exception(0), CudaError)
    assert not second.future.done()
    queued = w.submit("a")
    w.engine.close()
    if times == 1:
        second.verify()
    else:
        assert isinstance(second.future.exception(0), CudaError)
    assert isinstance(queued.future.exception(0), Unavailable)


def test_a_history_of_ones_own_is_closed_where_copies_cannot_be_waited_for(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[object] = []
    monkeypatch.setattr("mtserve.engine.core.LEFT_BEHIND", kept)
    w = world()
    w.put("a", 5)
    w.tiers.mover.wait = _device_is_gone
    with pytest.raises(CudaError):
        w.engine.close()
    assert kept == [(w.engine._core.memory, w.tiers.mover)]
    with pytest.raises(Unavailable, match="closed"):
        w.engine.history.read("a")


class GatedPinning:
    """Pins the first chunk at once, and each later one when told to."""

    def __init__(self) -> None:
        self.pinned: list[int] = []
        self.waiting, self.go_on = threading.Event(), threading.Event()

    def pin(self, address: int, size: int) -> None:
        if self.pinned:
            self.waiting.set()
            assert self.go_on.wait(60)
        self.pinned.append(address)

    def unpin(self, address: int) -> None:
        self.pinned.remove(address)


def test_a_loop_that_breaks_ends_the_growth_of_the_arena_before_it_unpins(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinning = GatedPinning()
    monkeypatch.setattr("mtserve.engine.memory.HostArena", partial(HostArena, chunk_bytes=1))
    monkeypatch.setattr("mtserve.engine.memory.ChaosPinning", lambda chaos, inner: pinning)
    w = world(start=True, host_pages=64, chaos="pin=0.5")  # four chunks
    w.put("a", 5)
    assert pinning.waiting.wait(10)  # the second chunk is under way
    core = w.engine._core
    core._finish_copies = _device_is_gone  # type: ignore[method-assign]
    pending = w.submit("a")
    with pytest.raises(Unavailable, match="stopped"):
        pending.future.result(10)
    assert core.memory is not None and core.memory._growth is not None
    assert core.memory._growth._stopping.wait(10)
    assert len(pinning.pinned) == 1
    pinning.go_on.set()
    assert w.engine._loop._thread is not None
    w.engine._loop._thread.join(10)
    assert w.engine._loop.state == "broken"
    assert pinning.pinned == []


def test_the_batch_behind_which_loads_cannot_be_begun_is_answered(world: Make) -> None:
    """Where batches decide how states come back, the first goes ahead of the loads for the others."""
    w = deep_world(world, gpu_pages=26)
    on_the_host(w, "a")
    w.overlap()
    mover = w.delay_copies()
    real = mover.submit

    def submit(kind: str, copies: Any) -> NoReturn:
        real(kind, copies)
        _device_is_gone()

    mover.submit = submit  # type: ignore[method-assign]
    w.put("new", 5)
    launched, waits = w.submit("new"), w.submit("a")
    with pytest.raises(CudaError):
        w.step()
    w.engine.close()
    launched.verify()
    assert isinstance(waits.future.exception(0), Unavailable)
