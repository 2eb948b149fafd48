"""Copies that do not end: told, gone around, and harmless should they end after all."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from engine_world import DelayedMover, World

Make = Callable[..., World]
TIMEOUT_MS = 200


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
