"""When states go to the host: full pages at once, a partly filled one when its user has paused, and few together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_world import DelayedMover, World

from mtserve.cache.index import TieredIndex
from mtserve.engine.tiers.write_back import HURRY_S, WriteBack
from mtserve.errors import TransferFailed

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


def test_where_tails_are_lost_they_are_saved_at_once_for_some_time(world: Make) -> None:
    w = lagging(world, gpu_pages=11)
    w.put("a", 9)
    w.score("a")
    step(w)
    w.evict_from_gpu()
    assert w.value("evicted_unsaved_pages_total") == 1
    w.score("a")
    step(w)
    assert w.held("a") == (11, 11)
    pause(w, 1000 * HURRY_S)
    w.put("b", 9)
    w.score("b")
    step(w)
    assert w.held("b")[1] == 8
    w.assert_idle()


def test_a_full_host_is_in_no_hurry(world: Make) -> None:
    w = lagging(world, gpu_pages=11, host_pages=2)
    w.put("a", 9)
    w.score("a")
    step(w)
    assert w.held("a") == (11, 8)
    w.evict_from_gpu()
    assert w.value("evicted_unsaved_pages_total") > 0
    w.put("b", 1)
    w.score("b")
    step(w)
    assert w.held("b") == (3, 0)


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


# The link's queue


def queueing(world: Make, pages: int, **options: Any) -> tuple[World, DelayedMover]:
    """A world whose write-back begins no more copies once `pages` are under way; they end when told to."""
    w = world(write_back_queue=f"{pages * 1024}B", page_tokens=4, **options)
    assert w.engine.stats()["page_bytes"] == 1024
    return w, w.delay_copies(late=True)


def test_users_without_room_are_saved_as_the_host_tier_grows() -> None:
    index = TieredIndex(4, 20, 2, clock=lambda: 0.0)
    write_back = WriteBack(index, lambda: 0.0, 0.0)
    chains = {user: np.arange(1, 12, dtype=np.uint64) + 100 * place for place, user in enumerate("abc")}
    cached, stored, table = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((1, 3), np.int32)
    for user, chain in chains.items():
        index.end_batch(index.begin_batch([user], [chain], cached, stored, table), True)
    write_back.grew("abc")
    held, deferred = write_back.begin(100, host_grows=True)
    assert [(store.user, store.tokens) for store in held] == [("a", 8)]  # all the room there is
    assert not deferred
    assert len(write_back) == 3
    assert write_back.due_in() == math.inf  # nothing to do about it until the tier has grown
    for store in held:
        index.end_store(store.ticket, True)
    index.grow_host(7)
    write_back.host_grew()
    stores, _ = write_back.begin(100)
    assert [(store.user, store.first_token, store.tokens) for store in stores] == [
        ("a", 8, 11),
        ("b", 0, 11),
        ("c", 0, 11),
    ]
    assert len(write_back) == 0
    index.check()


def test_users_wait_for_the_queue_and_all_are_saved_in_the_end(world: Make) -> None:
    w, mover = queueing(world, 6)
    for user in "abcde":
        w.put(user, 9)  # 11 tokens, 3 pages
    scripted = [
        # user scored, copies under way, users unsaved, times that users began to wait
        ("a", 1, 0, 0),
        ("b", 2, 0, 0),
        ("c", 2, 1, 1),
        ("d", 2, 2, 1),
        ("e", 2, 3, 1),
    ]
    for user, stores, unsaved, deferred in scripted:
        w.submit(user)
        w.step()
        assert (len(mover.jobs), w.value("stores_in_flight")) == (stores, stores)
        assert w.value("store_bytes_in_flight") == stores * 3 * 1024
        assert w.value("unsaved_users") == unsaved
        assert w.value("write_backs_deferred_total") == deferred
    for stores, unsaved in ((2, 2), (2, 1), (2, 0), (1, 0), (0, 0)):
        mover.release()
        w.step()
        assert (len(mover.jobs), w.value("stores_in_flight")) == (stores, stores)
        assert w.value("unsaved_users") == unsaved
    assert w.value("write_backs_deferred_total") == 1
    assert [w.held(user) for user in "abcde"] == [(11, 11)] * 5
    assert w.value("stores_total") == 5
    assert w.value("store_bytes_total") == 15 * 1024
    assert w.value("evicted_unsaved_pages_total") == w.value("stores_failed_total") == 0
    w.assert_idle()


def test_a_user_larger_than_the_queue_is_saved_whole(world: Make) -> None:
    w, mover = queueing(world, 0)  # one page at least
    for user in "ab":
        w.put(user, 20)  # 22 tokens, 6 pages
        w.submit(user)
        w.step()
    assert w.value("store_bytes_in_flight") == 6 * 1024
    assert w.value("write_backs_deferred_total") == 1
    mover.release()
    w.step()
    assert [w.held(user) for user in "ab"] == [(22, 22), (22, 0)]
    assert w.value("store_bytes_in_flight") == 6 * 1024
    mover.release()
    w.step()
    assert w.held("b") == (22, 22)
    w.assert_idle()


def test_full_pages_that_wait_go_with_the_tail_once_their_user_has_paused(world: Make) -> None:
    w, mover = queueing(world, 2, write_back_idle_ms=IDLE_MS)
    for user in "ab":
        w.put(user, 9)
        w.submit(user)
        w.step()
    assert [len(copy.gpu_pages) for _, copy, _ in mover.jobs] == [2]  # of "a", without its tail
    assert w.value("write_backs_deferred_total") == 1
    assert w.engine._core.busy()
    pause(w)
    w.step()
    assert w.value("write_backs_deferred_total") == 1  # still the same wait
    mover.release()
    w.step()
    assert [(copy.user, len(copy.gpu_pages)) for _, copy, _ in mover.jobs] == [("b", 2)]
    assert w.value("unsaved_users") == 2  # the tails
    mover.release()
    w.step()
    assert [(copy.user, copy.tokens) for _, copy, _ in mover.jobs] == [("a", 11), ("b", 11)]
    mover.release_all()
    w.step()
    assert [w.held(user) for user in "ab"] == [(11, 11)] * 2
    assert w.value("unsaved_users") == 0
    w.assert_idle()


def test_a_user_forgotten_while_it_waits_leaves_the_queue_to_others(world: Make) -> None:
    w, mover = queueing(world, 3)
    for user in "abc":
        w.put(user, 9)
        w.submit(user)
        w.step()
    w.engine.invalidate("b")
    assert w.value("unsaved_users") == 2
    mover.release()
    w.step()
    assert [copy.user for _, copy, _ in mover.jobs] == ["c"]
    assert w.value("unsaved_users") == 0
    mover.release()
    w.step()
    assert [w.held(user) for user in "abc"] == [(11, 11), (0, 0), (11, 11)]
    w.assert_idle()


def test_what_is_evicted_while_it_waits_is_counted_and_encoded_again(world: Make) -> None:
    w, mover = queueing(world, 1, gpu_pages=11)
    for user in "ab":
        w.put(user, 9)
        w.submit(user)
        w.step()
    w.put("c", w.model.config.max_history)
    w.submit("c")
    w.step()
    lost = w.value("evicted_unsaved_pages_total")
    assert lost > 0
    assert w.held("b")[0] == 4 * (3 - lost)
    assert w.value("evicted_pages_total", "gpu") == lost  # those of "a" are being read
    while mover.jobs:
        mover.release()
        w.step()
    assert w.held("a")[1] == 11
    assert w.held("b")[1] % 4 == 0  # whole pages: a prefix
    result = w.submit("b")
    while not result.future.done():
        w.step()
        mover.release_all()
    assert result.verify().encoded_tokens > 0
    mover.release_all()
    w.run()
    mover.release_all()
    w.run()
    w.assert_idle()


@pytest.mark.parametrize("idle_ms", [0, IDLE_MS])
@pytest.mark.parametrize("host_pages", [16, 64], ids=["host smaller", "host larger"])
def test_host_tokens_are_always_a_prefix_whatever_the_queue_does(world: Make, host_pages: int, idle_ms: int) -> None:
    """Copies end in their order at random times, and some fail; what is loaded again is held against a recompute."""

    share = 0.1

    def sometimes(kind: str) -> None:
        if w.rng.random() < share:
            raise TransferFailed(f"{kind}: this one not")

    w = world(gpu_pages=22, host_pages=host_pages, page_tokens=4, write_back_queue="2048B", write_back_idle_ms=idle_ms)
    mover = w.delay_copies(late=True, fault=sometimes)
    for user in "abcdef":
        w.put(user, int(w.rng.integers(12)))
    pending, most = [], 0
    for _ in range(250):
        user = "abcdef"[w.rng.integers(6)]
        w.append(user, int(w.rng.integers(3)))
        pending.append(w.submit(user, 2))
        w.clock.now += float(w.rng.random()) * IDLE_MS / 1000
        w.step()
        most = max(most, sum(len(copy.gpu_pages) for kind, copy, _ in mover.jobs if kind == "store"))
        for _ in range(int(w.rng.integers(3))):
            if mover.jobs:
                mover.release()
        for each in [each for each in pending if each.future.done()]:
            each.verify()
            pending.remove(each)
    for _ in range(400):
        w.clock.now += IDLE_MS / 1000
        mover.release_all()
        if not w.step() and not w.engine._core.busy() and not w.tiers.due_in() < 1:
            break
    for each in pending:
        each.verify()
    assert 2 <= most <= 2 + 11  # a user's pages beyond what was free
    assert w.value("write_backs_deferred_total") > 0
    assert min(w.value(f"{kind}s_{how}") for kind in ("load", "store") for how in ("total", "failed_total")) > 0
    w.assert_idle()
    if host_pages == 64:
        share = 0.0
        for user in "abcdef":  # once more, undisturbed: nothing is left that the host does not have
            w.submit(user)
            for _ in range(12):
                w.clock.now += IDLE_MS / 1000
                w.step()
                mover.release_all()
        assert w.value("unsaved_users") == 0
        held = [w.held(user) for user in "abcdef"]
        assert all(host >= gpu for gpu, host in held) and max(held)[0] > 0
    w.assert_empty()
