"""The tiers' memory under an engine: the host tier grows while it serves, and what cannot be pinned is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from engine_world import World
from small_models import small_model

from mtserve.engine.engine import Engine
from mtserve.engine.setup import available_memory
from mtserve.errors import InvalidArgument, ResourceExhausted, TransferFailed
from mtserve.restore.costs import costs_for_cpu
from mtserve.transfer.arena import HostArena
from mtserve.transfer.chaos import Chaos, ChaosPinning

Make = Callable[..., World]
CHUNK_PAGES, HOST_PAGES = 16, 64  # four chunks
USERS = [f"user {number}" for number in range(10)]  # of six pages each


class StepwisePinning:
    """Pins a chunk each time it is allowed to; from the `failing`-th on none can be pinned."""

    def __init__(self, allowed: int, failing: int = 1000) -> None:
        self.pinned: list[int] = []
        self.calls = 0
        self.waiting = threading.Event()
        self._failing = failing
        self._allowed = threading.Semaphore(allowed)

    def allow(self, chunks: int = 1) -> None:
        self._allowed.release(chunks)

    def pin(self, address: int, size: int) -> None:
        if not self._allowed.acquire(blocking=False):
            self.waiting.set()
            assert self._allowed.acquire(timeout=60)
        self.calls += 1
        if self.calls > self._failing:
            raise TransferFailed("the link has no room left", field="pinning")
        self.pinned.append(address)

    def unpin(self, address: int) -> None:
        self.pinned.remove(address)


@pytest.fixture
def pinned_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, Any]]:
    """Has engines pin by what it is given, in chunks of 16 pages; the configuration that makes them do so."""

    def install(pinning: Any) -> dict[str, Any]:
        monkeypatch.setattr("mtserve.engine.memory.HostArena", partial(HostArena, chunk_bytes=1))
        monkeypatch.setattr("mtserve.engine.memory.ChaosPinning", lambda chaos, inner: pinning)
        return {"chaos": "pin=0.5", "host_pages": HOST_PAGES, "gpu_pages": 14}

    return install


PinnedBy = Callable[[Any], dict[str, Any]]


def _score_all(w: World, users: list[str] = USERS) -> None:
    pending = [w.submit(user, 2) for user in users]
    for each in pending:
        each.future.result(30)
        each.verify()


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def _host_pages(w: World) -> int:
    return int(w.engine.stats()["tiers"]["host"]["pages"]["total"])


def _put_all(w: World) -> None:
    for user in USERS:
        w.put(user, 20)  # 22 tokens, six pages


def test_the_host_tier_grows_while_the_engine_serves(world: Make, pinned_by: PinnedBy) -> None:
    pinning = StepwisePinning(allowed=1)
    w = world(small_model(), start=True, **pinned_by(pinning))
    page = w.engine.stats()["page_bytes"]
    assert w.engine.stats()["host_memory"] == {"bytes": 64 * page, "ready_bytes": 16 * page, "error": None}
    _put_all(w)
    _score_all(w)
    assert w.value("stores_total") > 0
    for pages in range(CHUNK_PAGES, HOST_PAGES, CHUNK_PAGES):
        assert _host_pages(w) == w.value("pages_capacity", "host") == pages
        pinning.allow()
        _score_all(w)
        _until(lambda before=pages: _host_pages(w) == before + CHUNK_PAGES)
        w.engine.check()
    _score_all(w)  # what had found no room is saved now
    assert w.engine.drain(30)
    assert w.engine.stats()["host_memory"] == {"bytes": 64 * page, "ready_bytes": 64 * page, "error": None}
    assert all(host > 0 for _, _, host in w.tiers.index.users())
    assert w.tiers.index.stats().host.used > 3 * CHUNK_PAGES
    assert w.value("loads_total") > 0
    w.assert_empty()
    w.engine.close()
    assert pinning.pinned == []


def test_packed_pages_come_and_go_while_the_host_tier_grows(world: Make, pinned_by: PinnedBy) -> None:
    pinning = StepwisePinning(allowed=1)
    options = {"host_format": "kv8", "tolerance": 0.05, "costs": costs_for_cpu(), "host_pages": 128}  # two chunks
    w = world(small_model(d=32), start=True, **{**pinned_by(pinning), **options})
    for user in USERS:
        w.put(user, 38)  # ten pages
    ready, sizes = 0, []
    while ready < 128:
        _until(lambda before=ready: _host_pages(w) > before)
        ready = _host_pages(w)
        sizes.append(ready)
        for _ in range(2):
            _score_all(w)
        w.engine.check()
        pinning.allow()
    assert w.engine.drain(30)
    assert sizes == [64, 128]
    assert w.tiers.index.stats().host.used > 64
    assert w.value("restored_batches_total", "load") > 0
    w.assert_empty()


def test_a_chunk_that_cannot_be_pinned_leaves_a_smaller_tier_that_serves(world: Make, pinned_by: PinnedBy) -> None:
    pinning = StepwisePinning(allowed=1, failing=2)
    w = world(small_model(), start=True, **pinned_by(pinning))
    _put_all(w)
    pinning.allow(100)
    _until(lambda: w.engine.stats()["host_memory"]["error"] is not None)
    facts = w.engine.stats()["host_memory"]
    assert facts["error"].startswith("host_cache: 32.0 KiB of 64.0 KiB are pinned, the next 16.0 KiB cannot be")
    assert "the link has no room left" in facts["error"]
    assert facts["ready_bytes"] == 32 * w.engine.stats()["page_bytes"]
    _until(lambda: _host_pages(w) == 2 * CHUNK_PAGES)
    _score_all(w)
    for _ in range(3):
        _score_all(w, USERS[:4])  # more than the device holds, not more than the host
    assert w.engine.drain(30)
    assert w.value("loads_total") > 0
    assert w.value("evicted_pages_total", "host") > 0
    assert pinning.calls == 3  # nobody tries again by itself
    w.assert_empty()
    w.engine.close()
    assert pinning.pinned == []
    assert w.engine.stats()["host_memory"]["error"] == facts["error"]


@pytest.mark.parametrize(
    ("failing", "options"),
    [
        (0, {"start": True}),  # the first chunk is wanted before anything else
        (2, {"start": True, "host_pinning": "wait"}),
        (3, {"start": False}),  # nothing runs in the background of an engine without a thread
    ],
    ids=["first", "wait", "by hand"],
)
def test_an_engine_that_must_have_what_cannot_be_pinned_is_not_made(
    pinned_by: PinnedBy, failing: int, options: dict[str, Any]
) -> None:
    pinning = StepwisePinning(allowed=100, failing=failing)
    threads = threading.active_count()
    with pytest.raises(ResourceExhausted, match="the link has no room left") as caught:
        World(small_model(), **pinned_by(pinning), **options)
    assert caught.value.field == "host_cache"
    assert pinning.calls == failing + 1
    assert pinning.pinned == []
    assert threading.active_count() == threads


def test_an_engine_that_waits_has_all_of_its_tier_from_the_start(world: Make, pinned_by: PinnedBy) -> None:
    pinning = StepwisePinning(allowed=100)
    w = world(small_model(), start=True, host_pinning="wait", **pinned_by(pinning))
    assert len(pinning.pinned) == 4
    assert _host_pages(w) == HOST_PAGES
    assert [each.name for each in threading.enumerate() if each.name == "arena-growth"] == []


def test_closing_ends_the_growth_after_its_chunk_and_unpins_all(world: Make, pinned_by: PinnedBy) -> None:
    pinning = StepwisePinning(allowed=1)
    w = world(small_model(), start=True, **pinned_by(pinning))
    assert pinning.waiting.wait(30)  # the second chunk is under way
    closing = threading.Thread(target=w.engine.close)
    closing.start()
    _until(w.engine._core.memory._growth._stopping.is_set)
    assert len(pinning.pinned) == 1
    pinning.allow(100)
    closing.join(30)
    assert not closing.is_alive()
    assert pinning.calls == 2
    assert pinning.pinned == []


def test_a_configuration_found_wrong_later_leaves_nothing_pinned(pinned_by: PinnedBy) -> None:
    pinning = StepwisePinning(allowed=100)
    with pytest.raises(InvalidArgument) as caught:
        World(small_model(), write_back_queue="plenty", **pinned_by(pinning))
    assert caught.value.field == "write_back_queue"
    assert pinning.pinned == []


def test_a_runner_that_cannot_be_made_leaves_nothing_pinned(
    pinned_by: PinnedBy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmade(*_: Any) -> None:
        assert len(pinning.pinned) == 4
        raise RuntimeError("no kernel fits")

    pinning = StepwisePinning(allowed=100)
    monkeypatch.setattr("mtserve.engine.served.make_runner", unmade)
    with pytest.raises(RuntimeError, match="no kernel fits"):
        World(small_model(), **pinned_by(pinning))
    assert pinning.pinned == []


def test_pins_that_fail_on_purpose_stop_the_growth(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an operator asks for it: `chaos` alone, with a seed by which the third chunk fails."""
    monkeypatch.setattr("mtserve.engine.memory.HostArena", partial(HostArena, chunk_bytes=1))

    def fails(pinning: ChaosPinning) -> bool:
        try:
            pinning.pin(0, 1)
        except TransferFailed:
            return True
        return False

    seeds = (
        seed
        for seed in range(1000)
        if (pinning := ChaosPinning(Chaos(pin=0.5, seed=seed), None))
        and [fails(pinning) for _ in range(3)] == [False, False, True]
    )
    w = world(small_model(), start=True, gpu_pages=14, host_pages=HOST_PAGES, chaos=f"pin=0.5,seed={next(seeds)}")
    _until(lambda: w.engine.stats()["host_memory"]["error"] is not None)
    assert "pinning failed on purpose (pin=0.5)" in w.engine.stats()["host_memory"]["error"]
    _until(lambda: _host_pages(w) == 2 * CHUNK_PAGES)
    _put_all(w)
    _score_all(w)
    assert w.engine.drain(30)
    w.assert_empty()


def test_more_than_the_memory_that_is_available_is_refused() -> None:
    with pytest.raises(ResourceExhausted, match="of host memory that are available") as caught:
        World(small_model(), host_cache=f"{2 * available_memory()}B")
    assert caught.value.field == "host_cache"


def test_a_size_that_cannot_be_read_is_named() -> None:
    with pytest.raises(InvalidArgument) as caught:
        World(small_model(), host_cache="a lot")
    assert caught.value.field == "host_cache"


def test_without_tiers_there_is_no_memory(world: Make) -> None:
    engine: Engine = world(cache="off").engine
    assert engine.stats()["host_memory"] == {}
    w = world(host_pages=0)
    assert w.engine.stats()["host_memory"] == {"bytes": 0, "ready_bytes": 0, "error": None}
