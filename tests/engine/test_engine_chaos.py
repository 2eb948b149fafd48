"""An engine whose copies fail and come late all the time: every score right, every pair closed, no page leaked."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from engine_world import Pending, World
from small_models import CAUSAL, small_model

from mtserve.engine.engine import Engine
from mtserve.errors import InvalidArgument
from mtserve.transfer.chaos import Chaos
from mtserve.transfer.mover import LOAD, SyncMover
from mtserve.transfer.slow_mover import SlowMover
from mtserve.types import ScoreResult

Make = Callable[..., World]
STORM = "fail=0.3,slow=0.3:25ms,seed=5"


def settle(w: World) -> None:
    """Let every slow copy end, and what follows from it."""
    for _ in range(200):
        w.clock.now += 0.03
        if not w.step() and not w.engine._core.busy():
            return
    raise AssertionError("the engine is still busy")


def some_request(w: World, user: str, pending: list[Pending]) -> None:
    draw = w.rng.random()
    if draw < 0.1:
        w.truncate(user, max(0, len(w.rows[user]) - int(w.rng.integers(1, 4))))
    elif draw < 0.15:
        w.put(user, int(w.rng.integers(12)))
    elif draw < 0.2:
        w.engine.invalidate(user)
    elif draw < 0.3:
        w.engine.prefetch(user)
    elif draw < 0.4 and pending:
        pending.pop(int(w.rng.integers(len(pending)))).future.cancel()
    w.append(user, int(w.rng.integers(4)))
    pending.append(w.submit(user, 2))


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize(("gpu_pages", "host_pages"), [(9, 30), (20, 18)], ids=["host larger", "host smaller"])
def test_a_storm_leaves_every_score_exact(
    world: Make, changes: dict[str, Any], overlap: bool, gpu_pages: int, host_pages: int
) -> None:
    w = world(
        small_model(max_history=24, max_realtime=6, **changes),
        gpu_pages=gpu_pages,
        host_pages=host_pages,
        page_tokens=3,
        chaos=STORM,
        write_back_idle_ms=10,
    )
    if overlap:
        w.overlap()
    users = "abcdef"
    for user in users:
        w.put(user, 9)
    pending: list[Pending] = []
    asked = verified = most = 0
    while asked < 300:
        some_request(w, users[w.rng.integers(len(users))], pending)
        asked += 1
        w.clock.now += float(w.rng.random()) * 0.02
        w.step()
        most = max(most, w.tiers.mover.pending())
        for each in [each for each in pending if each.future.done()]:
            each.verify()
            pending.remove(each)
            verified += 1
    settle(w)
    for each in pending:
        each.verify()
    assert verified + len(pending) > 200
    assert most > 1
    for name in ("loads_total", "loads_failed_total", "stores_total", "stores_failed_total"):
        assert w.value(name) > 0, name
    for kind in ("load", "store"):
        assert w.value(f"{kind}_bytes_in_flight") == 0
        ended = w.value(f"{kind}s_total") + w.value(f"{kind}s_failed_total")
        seconds = w.engine.metrics.distribution(f"{kind}_seconds")
        assert seconds.count == ended
        assert seconds.max >= 0.025
    assert w.engine.metrics.distribution("return_seconds").count > 0
    w.assert_empty()


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_a_storm_of_batches_over_loads_leaves_every_score_exact(world: Make, changes: dict[str, Any]) -> None:
    """Batches begin over loads whose bytes come, or fail to, while these are under way; some loads are told late."""
    w = world(
        small_model(max_history=24, max_realtime=6, **changes),
        gpu_pages=12, host_pages=40, page_tokens=3, write_back_queue="2%", write_back_idle_ms=10,
    )  # fmt: skip
    w.overlap()
    chaos = Chaos.parse(STORM)
    mover = w.delay_copies(late=True, fault=chaos, near_loads=True)
    w.use_mover(SlowMover(mover, chaos.delay, w.clock))
    users = "abcdef"
    for user in users:
        w.put(user, 9)
    pending: list[Pending] = []
    verified = 0
    for _ in range(300):
        some_request(w, users[w.rng.integers(len(users))], pending)
        w.clock.now += float(w.rng.random()) * 0.02
        w.step()
        for _ in range(int(w.rng.integers(3))):
            if mover.jobs:
                mover.release()
        for each in [each for each in pending if each.future.done()]:
            each.verify()
            pending.remove(each)
            verified += 1
    for _ in range(200):
        w.clock.now += 0.03
        mover.release_all()
        if not w.step() and not w.engine._core.busy():
            break
    for each in pending:
        each.verify()
    assert verified > 100
    assert mover.overlapped > 10
    assert w.value("loads_failed_total") > 0
    assert w.value("write_backs_deferred_total") > 0
    w.assert_empty()


@pytest.mark.parametrize("everybody", [False, True], ids=["one", "all"])
def test_a_load_of_states_since_forgotten_is_waited_for_by_nobody(world: Make, everybody: bool) -> None:
    w = world(gpu_pages=12, page_tokens=4)
    w.put("a", 9)
    w.score("a")
    w.evict_from_gpu()
    mover = w.delay_copies(late=True, near_loads=True)
    slow = SlowMover(mover, lambda kind: 0.05 if kind == LOAD else 0.0, w.clock)  # late, so not near
    w.use_mover(slow)
    first = w.submit("a")
    w.step()
    assert w.value("loads_in_flight") == 1
    assert not first.future.done()
    w.engine.invalidate(None if everybody else "a")
    w.step()
    assert first.verify().encoded_tokens == 11  # over no load
    assert mover.overlapped == 0
    assert w.value("loads_in_flight") == 1
    mover.release_all()
    w.step()
    w.clock.now += 1
    w.run()
    mover.release_all()
    w.run()
    assert w.held("a") == (11, 11)  # as the batch made it; the load published nothing
    w.assert_empty()


def lives(world: Make, chaos: str) -> dict[str, float]:
    """Every counter after the same life."""
    w = world(gpu_pages=14, page_tokens=3, chaos=chaos)
    for user in "abc":
        w.put(user, 15)
    for number in range(60):
        w.submit("abc"[number % 3])
        w.clock.now += 0.01
        w.step()
    settle(w)
    found = w.engine.metrics.snapshot()
    return {name: value for name, value in found.items() if name.startswith(("load", "store", "prefix"))}


def test_seeded_runs_repeat(world: Make) -> None:
    first = lives(world, STORM)
    assert first["loads_failed_total"] > 0
    assert lives(world, STORM) == first
    assert lives(world, STORM.replace("seed=5", "seed=6")) != first


def test_a_slow_load_delays_its_own_user_alone(world: Make) -> None:
    w = world(gpu_pages=40, chaos="slow=1:50ms")
    w.put("a", 21)
    w.put("b", 5)
    w.submit("a")
    w.submit("b")
    settle(w)
    for number in range(3):
        w.put(f"filler {number}", w.model.config.max_history)
        w.submit(f"filler {number}")
        settle(w)
    w.put("c", 3)
    assert w.held("a")[0] < 23
    slow, other = w.submit("a"), w.submit("c")
    for _ in range(3):
        w.step()
    assert other.verify().encoded_tokens == 5
    assert w.value("loads_in_flight") == 1
    assert not slow.future.done()
    settle(w)
    assert slow.verify().host_tokens > 0


def test_an_engine_with_a_thread_of_its_own_goes_on(world: Make) -> None:
    w = world(gpu_pages=14, page_tokens=3, chaos="fail=0.2,slow=0.5:3ms,seed=1")
    engine = Engine(w.model, w.config, clock=time.time, history=w.engine.history)
    with engine:
        for user in "abc":
            w.put(user, 15)
        for number in range(60):
            candidates = w.candidates(2)
            candidates["time_ms"] = int(time.time() * 1000)
            result = engine.score("abc"[number % 3], candidates)
            Pending(w, _done(result), w.history_of("abc"[number % 3]), candidates).verify()
        assert engine.drain(10)
        engine.check()
        stats = engine.stats()
    assert stats["transfers"]["load"]["failed"] + stats["transfers"]["store"]["failed"] > 0
    assert stats["transfers"]["load"]["in_flight"] == stats["transfers"]["store"]["in_flight"] == 0


def _done(result: ScoreResult) -> Future[ScoreResult]:
    future: Future[ScoreResult] = Future()
    future.set_result(result)
    return future


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_chaos_that_cannot_be_read_stops_the_engine_before_it_takes_memory(cache: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        World(chaos="fail=2", gpu_pages=2**40, cache=cache)
    assert caught.value.field == "chaos"


def test_chaos_and_a_fault_of_ones_own_exclude_each_other() -> None:
    with pytest.raises(InvalidArgument, match="chaos: cannot be had together"):
        World(chaos="fail=0.1", fault=lambda kind: None)


def test_without_chaos_the_mover_is_the_plain_one(world: Make) -> None:
    assert type(world().tiers.mover) is SyncMover
    assert type(world(chaos=STORM).tiers.mover) is SlowMover


# What is counted


def test_a_copy_is_timed_and_its_bytes_are_in_flight_until_it_is_polled(world: Make) -> None:
    w = world(gpu_pages=12)
    page = w.tiers.mover.pool[0].nbytes
    mover = w.delay_copies()
    w.put("a", 21)  # 23 tokens, six pages
    w.score("a")
    assert (w.value("stores_in_flight"), w.value("store_bytes_in_flight")) == (1, 6 * page)
    stored = w.engine.stats()["transfers"]["store"]
    assert stored == {"bytes": 0, "gb_per_s": None, "busy_seconds": 0, "in_flight": 1, "failed": 0}
    w.clock.now += 0.5
    mover.release_all()
    w.run()
    assert w.value("store_bytes_in_flight") == 0
    found = w.engine.metrics.distribution("store_seconds")
    assert (found.count, found.sum) == (1, pytest.approx(0.5, rel=1e-6))
    stored = w.engine.stats()["transfers"]["store"]
    assert stored["bytes"] == w.value("store_bytes_total") == 6 * page
    assert stored["gb_per_s"] == pytest.approx(6 * page / 0.5 / 1e9, rel=1e-6)
    assert stored["busy_seconds"] == pytest.approx(0.5, rel=1e-6)
    assert w.engine.metrics.distribution("load_seconds").count == 0
    assert w.engine.stats()["transfers"]["load"]["gb_per_s"] is None


def test_speed_counts_each_second_of_a_direction_once(world: Make) -> None:
    w = world(gpu_pages=40)
    mover = w.delay_copies()
    for user in "ab":
        w.put(user, 10)  # 12 tokens, three pages
        w.score(user)
    w.clock.now += 0.25
    mover.release()
    w.run()
    w.clock.now += 0.25
    mover.release()
    w.run()
    w.clock.now += 3  # nothing is under way
    stored = w.engine.stats()["transfers"]["store"]
    assert stored["gb_per_s"] == pytest.approx(stored["bytes"] / 0.5 / 1e9, rel=1e-6)
    assert w.engine.metrics.distribution("store_seconds").sum == pytest.approx(0.75, rel=1e-6)


def test_the_time_between_eviction_and_return(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    assert w.engine.metrics.distribution("return_seconds").count == 0
    w.clock.now += 40
    assert w.score("a").host_tokens > 0
    found = w.engine.metrics.distribution("return_seconds")
    assert (found.count, found.sum) == (1, pytest.approx(40))


def test_an_engine_without_tiers_has_no_transfers(world: Make) -> None:
    assert world(cache="off", chaos=STORM).engine.stats()["transfers"] == {}
