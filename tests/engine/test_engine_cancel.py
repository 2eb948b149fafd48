"""Cancellation in every state, and a thousand of them: every pool back to its baseline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_world import World

from mtserve.errors import TransferFailed

Make = Callable[..., World]


def test_cancelled_while_queued_costs_nothing(world: Make) -> None:
    w = world()
    w.put("a", 5)
    pending = w.submit("a")
    assert pending.future.cancel()
    w.run()
    assert w.value("batches_total") == 0
    assert w.value("cancelled_total") == 1
    w.assert_empty()


@pytest.mark.parametrize("late", [False, True])
def test_cancelled_while_its_states_load(world: Make, late: bool) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    mover = w.delay_copies(late)
    pending = w.submit("a")
    w.step()
    assert mover.submitted == ["load"]
    assert pending.future.cancel()
    w.run()
    mover.release_all()
    w.run()
    assert w.value("cancelled_total") == 1
    assert w.score("a").gpu_tokens == 23  # the load went on, for whoever comes next
    mover.release_all()
    w.run()
    w.assert_empty()


def test_cancelled_while_it_runs(world: Make) -> None:
    w = world()
    w.put("a", 5)
    w.put("b", 5)
    pending, other = w.submit("a"), w.submit("b")
    w.hook("attention", lambda: pending.future.cancel() and None)
    w.run()
    assert pending.future.cancelled()
    other.verify()
    assert w.value("cancelled_total") == 1
    assert w.value("requests_by_tier_total", "cold") == 1
    w.assert_empty()


def test_cancelled_while_a_load_fails_under_its_batch_is_not_encoded_again(world: Make) -> None:
    """The batch is void and its job queued again, after the walk that looks for cancelled ones has passed."""
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
    failing = True
    pending = w.submit("a")
    w.step()
    assert (mover.overlapped, w.engine._core.batches.flight is not None) == (1, True)
    assert pending.future.cancel()
    batches = w.value("batches_total")
    w.run()
    assert w.value("loads_failed_total") == 1
    assert w.value("batches_total") - batches == 1  # the void one
    assert w.value("cancelled_total") == 1
    assert not w.engine._core.scheduler
    w.assert_empty()


def test_cancelled_when_done_changes_nothing(world: Make) -> None:
    w = world()
    w.put("a", 5)
    pending = w.submit("a")
    w.run()
    assert not pending.future.cancel()
    pending.verify()
    assert w.value("cancelled_total") == 0


def test_one_of_two_requests_of_a_user_is_cancelled(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    mover = w.delay_copies()
    first, second = w.submit("a"), w.submit("a")
    w.step()
    first.future.cancel()
    mover.release_all()
    w.run()
    assert second.verify().host_tokens == 19


def test_a_thousand_cancellations_leave_nothing_behind(world: Make) -> None:
    w = world(gpu_pages=13, host_pages=20, max_batch_requests=4, max_batch_tokens=60, cold_batch_tokens=30)
    mover = w.delay_copies()
    users = "abcdef"
    for user in users:
        w.put(user, 11)
    waiting, cancelled, verified, during = [], 0, 0, []
    w.hook("norm_gate", lambda: during and during.pop().future.cancel() and None)
    while cancelled < 1000:
        for user in users:
            waiting.append(w.submit(user, 1))
            if w.rng.random() < 0.1:
                w.append(user, 1)
        during[:] = [each for each in waiting if w.rng.random() < 0.2]
        for each in waiting:
            if w.rng.random() < 0.6:
                each.future.cancel()
        if w.rng.random() < 0.5:
            w.step()
        if w.rng.random() < 0.5:
            mover.release_all()
        for each in [each for each in waiting if each.future.done()]:
            waiting.remove(each)
            if each.future.cancelled():
                cancelled += 1
            elif verified % 5 == 0:
                each.verify()
            verified += not each.future.cancelled()
    for _ in range(50):
        mover.release_all()
        w.step()
    assert all(each.future.done() for each in waiting)
    cancelled += sum(each.future.cancelled() for each in waiting)
    assert verified > 30
    assert w.value("cancelled_total") == cancelled
    assert w.value("requests_total") == cancelled + sum(
        w.value("requests_by_tier_total", tier) for tier in ("gpu", "host", "cold")
    )
    w.assert_empty()
