"""A deleted user leaves nothing behind: no states, however late they come, and no name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from engine_world import World

from mtserve.cache.index import TieredIndex
from mtserve.engine.tiers.write_back import WriteBack
from mtserve.errors import TransferFailed

Make = Callable[..., World]


@pytest.mark.parametrize("when", ["in the queue", "in a batch"])
@pytest.mark.parametrize("fails", [False, True], ids=["the load ends well", "the load fails"])
def test_a_user_deleted_before_its_batch_over_a_load_ends_has_no_states(world: Make, fails: bool, when: str) -> None:
    failing = False

    def switched(kind: str) -> None:
        if kind == "load" and failing:
            raise TransferFailed(kind)

    w = world(gpu_pages=14, host_pages=40, restore="load")
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    w.overlap()
    mover = w.delay_copies(fault=switched, near_loads=True)
    failing = fails
    pending = w.submit("a")
    w.engine._loop.run_inbox()
    if when == "in a batch":
        w.step()
        assert (mover.overlapped, w.engine._core.batches.flight is not None) == (1, True)
    w.delete("a")
    for _ in range(5):
        w.step()
        mover.release_all()
    pending.verify()  # of the history as it stood
    assert w.value("loads_failed_total") == (fails and when == "in a batch")
    assert w.held("a") == (0, 0)
    assert not w.engine._core._forgotten
    w.run()
    w.assert_empty()


@pytest.mark.parametrize("who", ["a", None], ids=["one user", "everybody"])
def test_users_without_room_on_the_host_are_forgotten_with_their_states(who: str | None) -> None:
    index = TieredIndex(4, 8, 1, clock=lambda: 0.0)
    write_back = WriteBack(index, lambda: 0.0, 0.0)
    chain = np.arange(1, 12, dtype=np.uint64)
    cached, stored, table = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((1, 3), np.int32)
    for user in "ab":
        index.end_batch(index.begin_batch([user], [chain], cached, stored, table), True)
    write_back.grew("ab")
    write_back.begin(100, host_grows=True)
    assert len(write_back) == 2
    write_back.forget(who)
    assert len(write_back) == (0 if who is None else 1)
    write_back.host_grew()
    assert len(write_back) == (0 if who is None else 1)


def test_a_host_tier_that_grows_no_more_keeps_no_names_of_users_without_room(world: Make) -> None:
    w = world(gpu_pages=14, host_pages=2)
    for number in range(20):
        user = f"user {number}"
        w.put(user, 21)
        w.score(user)
        assert w.value("unsaved_users") == len(w.tiers._write_back) == 0
        if number % 2:
            w.delete(user)


def test_the_states_of_a_user_deleted_before_they_are_saved_are_not_waited_for(world: Make) -> None:
    w = world(write_back_idle_ms=1000)
    w.put("a", 21)
    w.put("b", 21)
    mover = w.delay_copies()
    w.submit("a")
    w.submit("b")
    while w.step():
        mover.release_all()
    assert w.value("unsaved_users") == 2  # their last pages
    w.delete("a")
    w.step()
    assert w.value("unsaved_users") == 1
    w.engine.invalidate()
    w.step()
    assert w.value("unsaved_users") == 0
    assert w.engine._core.due_in() == float("inf")
