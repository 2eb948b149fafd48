"""When states go to the host: full pages at once, a partly filled one when its user has paused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from engine_world import World

Make = Callable[..., World]
IDLE_MS = 50


def pause(w: World, ms: float = IDLE_MS) -> None:
    w.clock.now += ms / 1000


def step(w: World) -> None:
    for _ in range(4):
        w.step()


def lagging(world: Make, **options: Any) -> World:
    """A world of pages of 4 tokens whose users have 2 U tokens."""
    w = world(write_back_idle_ms=IDLE_MS, page_tokens=4, **options)
    assert len(w.schema.user) == 2
    return w


def test_full_pages_go_at_once_and_the_rest_after_a_pause(world: Make) -> None:
    w = lagging(world)
    w.put("a", 9)
    w.score("a")
    step(w)
    assert w.held("a") == (11, 8)
    assert w.value("unsaved_users") == 1
    pause(w, IDLE_MS - 1)
    step(w)
    assert w.held("a") == (11, 8)
    pause(w, 1)
    step(w)
    assert w.held("a") == (11, 11)
    assert w.value("unsaved_users") == 0
    w.assert_idle()


def test_a_page_crosses_the_link_once_while_its_user_fills_it(world: Make) -> None:
    w = lagging(world)
    w.put("a", 2)
    for _ in range(8):
        w.score("a")
        w.append("a", 1)
        pause(w, IDLE_MS / 2)
        step(w)
    assert w.held("a") == (11, 8)
    assert w.value("stores_total") == 2
    eager = world(write_back_idle_ms=0, page_tokens=4)
    eager.put("a", 2)
    for _ in range(8):
        eager.score("a")
        eager.append("a", 1)
        step(eager)
    assert eager.held("a") == (11, 11)
    assert eager.value("stores_total") == 8


def test_a_tail_that_was_lost_is_encoded_again(world: Make) -> None:
    w = lagging(world, gpu_pages=11)
    w.put("a", 9)
    w.score("a")
    step(w)
    w.evict_from_gpu()
    assert w.held("a") == (0, 8)
    result = w.score("a")
    assert (result.gpu_tokens, result.host_tokens, result.encoded_tokens) == (0, 8, 3)


def test_what_came_during_a_copy_is_saved_after_it(world: Make) -> None:
    w = lagging(world)
    mover = w.delay_copies(late=True)
    w.put("a", 9)
    w.score("a")
    step(w)
    w.append("a", 4)
    w.score("a")
    pause(w)
    step(w)
    assert mover.submitted == ["store"]
    mover.release_all()
    step(w)
    assert mover.submitted == ["store", "store"]
    mover.release_all()
    step(w)
    assert w.held("a") == (15, 15)
    w.assert_idle()


def test_users_are_saved_in_the_order_in_which_they_paused(world: Make) -> None:
    w = lagging(world)
    for user in "ab":
        w.put(user, 1)
        w.score(user)
        pause(w, IDLE_MS / 2)
    w.score("a")
    pause(w, IDLE_MS / 2)
    step(w)
    assert [w.held(user)[1] for user in "ab"] == [0, 3]
    pause(w)
    step(w)
    assert [w.held(user)[1] for user in "ab"] == [3, 3]


def test_a_forgotten_user_is_not_saved(world: Make) -> None:
    w = lagging(world)
    w.put("a", 1)
    w.score("a")
    w.engine.invalidate("a")
    pause(w)
    step(w)
    assert w.held("a") == (0, 0)
    assert w.value("stores_total") == 0
    assert w.value("unsaved_users") == 0


def test_the_loop_wakes_by_itself_for_a_tail(world: Make) -> None:
    w = world(write_back_idle_ms=30, page_tokens=4, start=True)
    w.engine._core.tiers._write_back._clock = time.monotonic
    w.put("a", 1)
    w.submit("a").future.result(10)
    end = time.monotonic() + 10
    while w.value("unsaved_users") or not w.value("stores_total"):
        assert time.monotonic() < end
        time.sleep(0.005)
    w.engine.close()
    assert w.held("a") == (3, 3)


@pytest.mark.parametrize("idle_ms", [0, IDLE_MS])
def test_no_host_tier_keeps_no_list(world: Make, idle_ms: int) -> None:
    w = world(host_pages=0, write_back_idle_ms=idle_ms)
    w.put("a", 9)
    w.score("a")
    step(w)
    assert w.value("unsaved_users") == 0
    w.assert_idle()
