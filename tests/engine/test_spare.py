"""Requests for which the device has no room, encoded whole: while it has nothing else to do, or to save a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_world import Pending, World

from mtserve.engine.queue.scheduler import PATIENCE

Make = Callable[..., World]
# A load takes longer than encoding one user of 23 tokens and 3 candidates, and less than encoding two.
TOKEN_S, LOAD_S = 0.01, 0.28


def crowded(world: Make, **options: Any) -> tuple[World, Any]:
    """Users a and b, of 6 pages each, on the host alone; the device has room for one of them."""
    w = world(gpu_pages=7, host_pages=40, **options)
    for user in "ab":
        w.put(user, 21)
        w.score(user)
    w.evict_from_gpu()
    assert [w.held(user)[1] for user in "ab"] == [23, 23]
    mover = w.delay_copies()
    mover.load_seconds = LOAD_S
    w.pace(TOKEN_S)
    return w, mover


def test_who_waits_for_room_is_encoded_while_another_loads(world: Make) -> None:
    w, mover = crowded(world)
    first, second = w.submit("a"), w.submit("b")
    w.run()
    assert not first.future.done()  # its load is under way
    result = second.verify()
    assert (result.gpu_tokens, result.host_tokens, result.encoded_tokens) == (0, 0, 23)
    assert w.held("b") == (0, 23)  # not kept: the host has it
    assert w.value("spare_requests_total") == 1
    mover.release_all()
    w.run()
    assert first.verify().encoded_tokens == 0
    mover.release_all()
    w.run()
    w.assert_empty()


def test_all_requests_of_one_user_are_encoded_together(world: Make) -> None:
    w, mover = crowded(world)
    first, others = w.submit("a"), [w.submit("b", count) for count in (1, 3, 2)]
    w.run()
    batches = w.value("batches_total")
    for each in others:
        each.verify()
    assert w.value("spare_requests_total") == 3
    mover.release_all()
    w.run()
    first.verify()
    assert w.value("batches_total") == batches + 1


@pytest.mark.parametrize("restore", ["load", "auto"])
def test_states_that_nobody_has_yet_wait_for_their_pages(world: Make, restore: str) -> None:
    """Encoded without pages they would never be saved; and where all is to be loaded, nothing is encoded in place of it."""
    w, mover = crowded(world, restore=restore)
    w.put("c", 21)
    first, stranger, known = w.submit("a"), w.submit("c"), w.submit("b")
    w.run()
    assert not first.future.done()
    assert not stranger.future.done()
    assert known.future.done() == (restore == "auto")
    pending: list[Pending] = [first, stranger, known]
    for _ in range(6):
        mover.release_all()
        w.run()
    for each in pending:
        each.verify()
    assert w.value("spare_requests_total") == (1 if restore == "auto" else 0)
    assert w.held("c")[1] == 23  # saved
    w.assert_empty()


def test_a_prefetch_is_never_encoded_for_nothing(world: Make) -> None:
    w, mover = crowded(world)
    mover.load_seconds = 0.24  # above the 0.23 s of encoding b
    first, prefetch = w.submit("a"), w.engine.prefetch("b")
    w.run()
    assert not first.future.done()
    assert not prefetch.done()
    assert w.value("spare_requests_total") == 0
    for _ in range(4):
        mover.release_all()
        w.run()
    first.verify()
    assert prefetch.done()


def test_who_waits_for_room_fills_the_batch_of_another(world: Make) -> None:
    w, mover = crowded(world)
    first = w.submit("a")
    w.run()
    mover.release_all()
    w.run()
    first.verify()  # and stays on the device
    batches = w.value("batches_total")
    warm, waiting = w.submit("a"), w.submit("b")
    w.step()
    assert warm.verify().gpu_tokens == 23
    assert waiting.verify().encoded_tokens == 23
    assert w.value("batches_total") == batches + 1
    assert w.value("spare_requests_total") == 1
    assert (w.held("a"), w.held("b")) == ((23, 23), (0, 23))
    mover.release_all()
    w.run()
    w.assert_empty()


def test_what_fills_a_batch_keeps_to_the_budget_of_cold_users(world: Make) -> None:
    w, mover = crowded(world, cold_batch_tokens=25, cold_after=30)  # b alone has 23 tokens and 3 candidates
    first = w.submit("a")
    w.run()
    mover.release_all()
    w.run()
    first.verify()
    warm, waiting = w.submit("a"), w.submit("b")
    w.step()
    warm.verify()
    assert not waiting.future.done()
    for _ in range(4):
        mover.release_all()
        w.run()
    waiting.verify()


def test_nobody_is_encoded_where_the_link_is_sooner(world: Make) -> None:
    w, mover = crowded(world)
    mover.load_seconds = 0.25
    first, second = w.submit("a"), w.submit("b")
    w.run()
    assert not first.future.done()
    assert not second.future.done()
    for _ in range(4):
        mover.release_all()
        w.run()
    assert first.verify().encoded_tokens == second.verify().encoded_tokens == 0
    assert w.value("spare_requests_total") == 0


# To encode anybody costs less than a share of a batch.
CHEAP = {"token_s": 1e-3, "batch_s": 100.0}


def cheap(world: Make, **options: Any) -> tuple[World, Any]:
    """As `crowded`, with loads that take no time, so that only the share of a batch speaks against waiting."""
    w, mover = crowded(world, **options)
    mover.load_seconds = 0.0
    w.pace(**CHEAP)
    return w, mover


def test_who_costs_less_than_a_share_of_a_batch_waits_for_no_room(world: Make) -> None:
    w, mover = cheap(world)
    w.put("c", 21)  # in no tier yet
    first, others = w.submit("a"), [w.submit("b"), w.submit("c"), w.submit("c")]
    w.run()
    assert not first.future.done()  # its load is under way
    for each in others:
        assert each.verify().encoded_tokens == 23
    assert w.value("spare_requests_total") == 3
    assert (w.held("b"), w.held("c")) == ((0, 23), (0, 0))
    mover.release_all()
    w.run()
    assert first.verify().host_tokens == 23
    w.score("c")
    assert w.held("c")[0] == 23  # kept, now that there is room
    mover.release_all()
    w.run()
    w.assert_empty()


def test_who_waits_for_no_room_is_a_batch_behind_that_of_others(world: Make) -> None:
    w, mover = cheap(world)
    first = w.submit("a")
    w.run()
    mover.release_all()
    w.run()
    first.verify()
    w.overlap()
    batches = w.value("batches_total")
    warm = w.submit("a")
    w.step()  # its batch is under way, and has all of the device's room
    waiting = w.submit("b")
    w.step()
    assert warm.verify().gpu_tokens == 23
    assert not waiting.future.done()
    w.step()
    assert waiting.verify().encoded_tokens == 23
    assert w.value("batches_total") == batches + 2
    mover.release_all()
    w.run()
    w.assert_empty()


@pytest.mark.parametrize("restore", ["load", "auto"])
def test_what_is_to_be_loaded_is_never_encoded_to_save_a_batch(world: Make, restore: str) -> None:
    w, mover = cheap(world, restore=restore)
    pending = [w.submit("a"), w.submit("b")]
    w.run()
    assert [each.future.done() for each in pending] == [False, restore == "auto"]
    for _ in range(4):
        mover.release_all()
        w.run()
    found = [each.verify().host_tokens for each in pending]
    assert found == ([23, 23] if restore == "load" else [23, 0])


def test_a_prefetch_waits_for_its_room(world: Make) -> None:
    w, mover = cheap(world)
    first, prefetch = w.submit("a"), w.engine.prefetch("b")
    w.run()
    assert not first.future.done()
    assert not prefetch.done()
    for _ in range(4):
        mover.release_all()
        w.run()
    assert w.value("spare_requests_total") == 0
    assert prefetch.done()


def test_who_costs_more_than_a_share_of_a_batch_waits(world: Make) -> None:
    """A batch costs 22 tokens here, and b has 23; c has 13."""
    w, mover = cheap(world)
    w.pace(1e-3, 22e-3)
    w.put("c", 11)
    first, large, small = w.submit("a"), w.submit("b"), w.submit("c")
    w.run()
    assert [each.future.done() for each in (first, large, small)] == [False, False, True]
    for _ in range(4):
        mover.release_all()
        w.run()
    assert large.verify().host_tokens == 23
    assert w.value("spare_requests_total") == 1


def test_who_waits_for_a_load_is_encoded_with_others_and_kept(world: Make) -> None:
    w = world(gpu_pages=20, host_pages=40)
    for user in "ab":
        w.put(user, 21)
        w.score(user)
    w.evict_from_gpu()
    w.delay_copies()
    w.pace(**CHEAP)
    alone = w.submit("a")
    w.step()
    assert not alone.future.done()  # no batch runs without it
    assert w.tiers.mover.submitted == ["load"]
    w.tiers.mover.release_all()
    w.run()
    assert alone.verify().host_tokens > 0
    batches = w.value("batches_total")
    ready, joined = w.submit("a"), w.submit("b")
    w.step()
    assert ready.verify().encoded_tokens == 0
    result = joined.verify()
    assert (result.host_tokens, result.gpu_tokens + result.encoded_tokens) == (0, 23)
    assert w.value("batches_total") == batches + 1
    assert w.held("b") == (23, 23)
    assert w.value("spare_requests_total") == 0


def test_room_stays_with_those_who_have_it_until_others_have_waited_long_enough(world: Make) -> None:
    """Of three users two fit: the first two, who ask all the time, and the third, who gets its turn nevertheless."""
    w = world(gpu_pages=13, host_pages=0)
    for user in "abc":
        w.put(user, 21)
    for user in "ab":
        w.score(user)
    waiting = w.submit("c")
    for _ in range(PATIENCE):
        others = [w.submit(user) for user in "ab"]
        w.step()
        assert [each.verify().gpu_tokens for each in others] == [23, 23]
        assert not waiting.future.done()
    others = [w.submit(user) for user in "ab"]
    w.run()
    assert waiting.verify().encoded_tokens == 23
    for each in others:
        each.verify()
