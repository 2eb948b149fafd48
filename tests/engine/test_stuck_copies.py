"""Copies that do not end: told, gone around, and harmless should they end after all."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable

import pytest
from engine_world import DelayedMover, World

Make = Callable[..., World]
TIMEOUT_MS = 200


@pytest.fixture(autouse=True)
def left_behind(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What closed engines leave behind for the rest of the process, which here is the test."""
    kept: list[object] = []
    monkeypatch.setattr("mtserve.engine.core.LEFT_BEHIND", kept)
    return kept


def stuck(world: Make, kind: str) -> tuple[World, DelayedMover]:
    """User "a" with a copy of this kind that has been under way for the timeout but one millisecond."""
    w = world(gpu_pages=14, host_pages=40, copy_timeout_ms=TIMEOUT_MS, write_back_idle_ms=0)
    w.put("a", 21)
    w.put("b", 5)
    if kind == "load":
        w.score("a")
        w.evict_from_gpu()
    mover = w.delay_copies()
    w.submit("a")
    while not mover.jobs:
        w.step()
    w.clock.now += (TIMEOUT_MS - 1) / 1000
    w.step()
    assert w.value("copies_stuck_total") == 0
    assert [each for each, *_ in mover.jobs] == [kind]
    return w, mover


def test_the_user_of_a_stuck_load_is_encoded_again(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    w, mover = stuck(world, "load")
    waiting = w.submit("a")
    w.step()
    assert not waiting.future.done()
    with caplog.at_level(logging.ERROR):
        w.clock.now += 0.002
        w.run()
    assert "a load of user 'a' has not ended" in caplog.text
    assert w.value("copies_stuck_total") == 1
    result = waiting.verify()
    assert (result.gpu_tokens + result.host_tokens, result.encoded_tokens) == (0, 23)
    stats = w.tiers.index.stats()
    assert (stats.loads_in_flight, stats.detached) == (1, 1)  # its pages are still held
    mover.release()  # late, and ignored
    w.run()
    assert w.held("a")[0] == 23
    again = w.submit("a")
    w.run()
    assert again.verify().gpu_tokens == 23
    mover.release_all()
    w.run()
    mover.release_all()
    w.run()
    w.assert_empty()


def test_others_go_on_beside_a_stuck_store(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    w, mover = stuck(world, "store")
    with caplog.at_level(logging.ERROR):
        w.clock.now += 0.002
        for _ in range(3):
            w.step()
    assert caplog.text.count("a store of user 'a' has not ended") == 1  # told once
    for user in "ba":
        pending = w.submit(user)
        w.run()
        pending.verify()
    assert w.value("copies_stuck_total") == 1
    assert w.held("a") == (23, 0)
    mover.release_all()
    w.run()
    assert w.held("a") == (23, 23)
    mover.release_all()
    w.run()
    w.assert_empty()


def _end_others(w: World, mover: DelayedMover, stuck_ticket: int) -> None:
    """Step once, and end every copy but the stuck one."""
    w.step()
    for place in reversed(range(len(mover.jobs))):
        if mover.jobs[place][1].ticket != stuck_ticket:
            mover.release(place)


@pytest.mark.parametrize("restore", ["auto", "load"])
def test_who_could_be_loaded_is_encoded_where_a_stuck_load_holds_the_pool(world: Make, restore: str) -> None:
    w = world(gpu_pages=11, host_pages=80, copy_timeout_ms=TIMEOUT_MS, restore=restore)
    w.put("a", 40)
    w.put("b", 21)
    w.score("b")
    w.score("a")
    w.evict_from_gpu()
    assert w.held("b") == (0, 23)
    mover = w.delay_copies()
    first = w.submit("a")
    w.step()
    assert [(kind, len(copy.gpu_pages)) for kind, copy, _ in mover.jobs] == [("load", 11)]  # all there are
    stuck_ticket = mover.jobs[0][1].ticket
    w.clock.now += 1
    for _ in range(3):
        _end_others(w, mover, stuck_ticket)
    first.verify()
    second = w.submit("b")
    for _ in range(10):
        _end_others(w, mover, stuck_ticket)
    assert second.verify().encoded_tokens == 23
    assert w.value("copies_stuck_total") == 1
    mover.release_all()
    w.run()
    w.assert_empty()


@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_copy_that_ended_and_was_looked_at_late_is_not_stuck(world: Make, kind: str) -> None:
    w, mover = stuck(world, kind)
    mover.release()  # in time
    w.clock.now += 1  # the loop was busy elsewhere
    w.run()
    assert w.value("copies_stuck_total") == 0
    assert w.held("a") == (23, 23)


def test_stores_begin_again_beside_a_stuck_one_and_the_engine_drains(world: Make) -> None:
    """The stuck one holds half of the host tier, which is all that stores may have under way."""
    w = world(gpu_pages=40, host_pages=12, copy_timeout_ms=TIMEOUT_MS)
    w.put("a", 21)
    mover = w.delay_copies()
    w.submit("a")
    w.step()
    stuck_ticket = mover.jobs[0][1].ticket
    w.clock.now += 1
    w.step()
    assert w.value("copies_stuck_total") == 1
    for user in "bcd":
        w.put(user, 5)
        w.submit(user)
    for _ in range(10):
        _end_others(w, mover, stuck_ticket)
    assert [w.held(user) for user in "bcd"] == [(7, 7)] * 3
    assert [copy.ticket for _, copy, _ in mover.jobs] == [stuck_ticket]
    assert w.value("unsaved_users") == 0
    assert w.engine._core.due_in() == math.inf
    assert not w.engine._core.busy()
    assert w.engine.drain(0.1)


def test_an_engine_with_a_stuck_copy_can_be_closed(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    w, mover = stuck(world, "store")
    w.clock.now += 0.002
    w.step()
    waited: list[float] = []
    mover.wait = waited.append  # type: ignore[method-assign, assignment]
    with caplog.at_level(logging.ERROR):
        w.engine.close()
    assert not waited
    assert "closed with a copy between the tiers stuck" in caplog.text
    memory = w.engine._core.memory
    assert memory is not None
    assert memory.arena.ready == memory.arena.capacity  # what the copy may still read or write is left alone


def test_closing_waits_no_longer_for_a_copy_than_until_it_counts_as_stuck(
    world: Make, caplog: pytest.LogCaptureFixture, left_behind: list[object]
) -> None:
    w, mover = stuck(world, "store")
    waited: list[float] = []

    def time_runs_out(timeout_s: float = math.inf) -> bool:
        waited.append(timeout_s)
        return False

    mover.wait = time_runs_out  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        w.engine.close()
    assert waited == [TIMEOUT_MS / 1000]
    assert "closed with a copy between the tiers stuck" in caplog.text
    assert left_behind == [(w.engine._core.memory, mover)]


def test_memory_that_a_stuck_copy_may_touch_outlives_its_engine(left_behind: list[object]) -> None:
    w, mover = stuck(World, "store")
    w.clock.now += 0.002
    w.step()
    kept = [weakref.ref(each) for each in (w.engine._core.memory, mover)]
    w.engine.close()
    del w, mover
    gc.collect()
    assert all(each() is not None for each in kept)
    left_behind.clear()
    gc.collect()
    assert [each() for each in kept] == [None, None]  # nothing else held it
