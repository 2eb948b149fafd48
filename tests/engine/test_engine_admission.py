"""What is refused, when, and with which error; deadlines; draining and closing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_world import World
from small_models import small_model

from mtserve.config import EngineConfig
from mtserve.engine.engine import Engine
from mtserve.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MtserveError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mtserve.types import Request

Make = Callable[..., World]


def test_malformed_requests_are_refused_by_name(world: Make) -> None:
    w = world(max_candidates=5)
    w.put("a", 3)
    good = w.candidates(2)
    for user, rows, field in (
        ("a", np.zeros(2), "candidates"),
        ("a", good[:, None], "candidates"),
        ("a", good[:0], "candidates"),
        ("a", w.candidates(6), "candidates"),
        ("", good, "user_id"),
        ("x" * 257, good, "user_id"),
        ("\ud800", good, "user_id"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            w.engine.score(user, rows)
        assert caught.value.field == field
    assert w.value("rejected_total", "invalid") == 7
    with pytest.raises(NotFound):
        w.engine.score("nobody", good)
    assert w.value("rejected_total", "not_found") == 1
    assert w.value("requests_total") == 0
    w.assert_idle()


def test_an_append_at_a_wrong_position_tells_the_true_one(world: Make) -> None:
    w = world()
    w.put("a", 7)
    with pytest.raises(FailedPrecondition) as caught:
        w.engine.append("a", w.rows["a"][-1:], 6)
    assert caught.value.position == 7
    w.append("a", 1)
    assert w.score("a").position == 8


def test_a_full_queue_refuses_at_once(world: Make) -> None:
    w = world(max_queue=3)
    w.put("a", 3)
    pending = [w.submit("a", 1) for _ in range(3)]
    with pytest.raises(ResourceExhausted) as caught:
        w.submit("a", 1)
    assert caught.value.field == "queue"
    assert w.value("rejected_total", "queue_full") == 1
    w.run()
    for each in pending:
        each.verify()
    w.score("a")


def test_a_deadline_already_past_is_refused_at_once(world: Make) -> None:
    w = world()
    w.put("a", 3)
    with pytest.raises(DeadlineExceeded):
        w.submit("a", deadline=w.clock() - 0.001)
    assert w.value("deadline_exceeded_total") == 1
    assert w.value("requests_total") == 0


def test_a_deadline_that_passes_in_the_queue_costs_nothing(world: Make) -> None:
    w = world()
    w.put("a", 3)
    late, patient = w.submit("a", deadline=w.clock() + 0.05), w.submit("a", deadline=w.clock() + 0.2)
    w.clock.now += 0.1
    w.run()
    with pytest.raises(DeadlineExceeded, match="100 ms in the queue"):
        late.future.result(0)
    patient.expected()
    assert patient.future.result(0).position == 3
    assert w.value("deadline_exceeded_total") == 1
    w.clock.now += 1
    hopeless = w.submit("a", deadline=w.clock() + 0.05)
    w.clock.now += 0.05
    batches = w.value("batches_total")
    w.run()
    assert w.value("batches_total") == batches
    assert isinstance(hopeless.future.exception(0), DeadlineExceeded)


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_hopeless_requests_start_no_load_and_take_nobodys_turn(world: Make, how: str) -> None:
    w = world(gpu_pages=12)
    for user in "ab":
        w.put(user, 21)
        w.score(user)
    w.evict_from_gpu()
    hopeless = w.submit("a", deadline=w.clock() + 0.01 if how == "deadline" else None)
    w.put("c", 40)  # not both fit
    other = w.submit("c")
    if how == "cancelled":
        hopeless.future.cancel()
    w.clock.now += 0.02
    assert w.step()
    assert hopeless.future.done()
    assert w.value("loads_total") == 0
    other.future.result(0)


def test_work_that_no_batch_could_finish_in_time_is_dropped_first(world: Make) -> None:
    w = world()
    w.put("a", 3)

    def slow() -> None:
        w.clock.now += 0.5

    w.hook("page_write", slow)
    w.submit("a", 1)
    w.run()  # the best batch known now took a second, two layers, for six tokens: so will six candidates
    hopeless, possible = w.submit("a", 6, deadline=w.clock() + 0.9), w.submit("a", 6, deadline=w.clock() + 1.1)
    w.step()
    assert isinstance(hopeless.future.exception(0), DeadlineExceeded)
    assert possible.future.result(0).position == 3
    assert w.value("batches_total") == 2


def test_the_default_deadline_applies_to_requests_without_one(world: Make) -> None:
    w = world(default_deadline_ms=50)
    w.put("a", 3)
    default, own = w.submit("a"), w.submit("a", deadline=w.clock() + 9)
    w.clock.now += 0.06
    w.run()
    assert isinstance(default.future.exception(0), DeadlineExceeded)
    assert own.future.exception(0) is None


# Set-up


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"gpu_cache": "10B"}, ResourceExhausted, "gpu_cache"),
        ({"gpu_cache": "lots"}, InvalidArgument, "gpu_cache"),
        ({"host_cache": "7 parsecs"}, InvalidArgument, "host_cache"),
        ({"snapshot_cache": "x"}, InvalidArgument, "snapshot_cache"),
        ({"device": "abacus"}, InvalidArgument, "device"),
        ({"device": "meta"}, InvalidArgument, "device"),
        ({"device": "cuda:99"}, InvalidArgument, "device"),
    ],
)
def test_a_bad_set_up_is_a_clear_error(options: dict[str, Any], error: type[MtserveError], field: str) -> None:
    with pytest.raises(error) as caught:
        Engine(small_model(), EngineConfig(**{"device": "cpu", **options}), start=False)
    assert getattr(caught.value, "field", None) == field


# Draining and closing


def test_draining_refuses_new_work_and_finishes_the_old(world: Make) -> None:
    w = world()
    w.put("a", 5)
    pending = w.submit("a")
    assert w.engine.drain(5)
    pending.verify()
    w.assert_idle()
    rows = w.rows["a"][-1:]
    for refused in (
        lambda: w.engine.score("a", w.candidates(1)),
        lambda: w.engine.append("a", rows),
        lambda: w.engine.put_user("a"),
        lambda: w.engine.truncate("a", 2),
        lambda: w.engine.prefetch("a"),
    ):
        with pytest.raises(Unavailable, match="draining"):
            refused()
    assert w.engine.stats()["state"] == "draining"


def test_draining_gives_up_when_time_runs_out(world: Make) -> None:
    w = world()
    mover = w.delay_copies()
    w.put("a", 5)
    pending = w.submit("a")
    assert not w.engine.drain(0.05)  # the write-back has not ended
    pending.verify()
    mover.release_all()
    assert w.engine.drain(5)


def test_draining_waits_for_the_batch_that_runs(world: Make) -> None:
    w = world(start=True)
    entered, go = threading.Event(), threading.Event()
    w.put("a", 5)

    def wait() -> None:
        entered.set()
        assert go.wait(10)

    w.hook("attention", wait)
    pending = w.submit("a")
    assert entered.wait(10)
    assert not w.engine.drain(0.05)
    assert not pending.future.done()
    go.set()
    assert w.engine.drain(10)
    pending.verify()


def test_closing_fails_what_waits_and_may_be_repeated(world: Make) -> None:
    w = world()
    w.put("a", 5)
    w.delay_copies()
    w.score("a")
    pending = [w.submit("a"), w.submit("a")]
    w.engine.close()
    w.engine.close()
    for each in pending:
        with pytest.raises(Unavailable, match="closed"):
            each.future.result(0)
    with pytest.raises(Unavailable, match="closed"):
        w.engine.submit(Request("a", w.candidates(1)))
    with pytest.raises(Unavailable, match="closed"):
        w.engine.append("a", w.rows["a"][-1:])
    w.assert_idle()
    assert w.engine.stats()["state"] == "closed"


def test_closing_a_running_engine_answers_everything(world: Make) -> None:
    w = world(start=True)
    w.put("a", 9)
    futures = [w.engine.submit(Request("a", w.candidates(2))) for _ in range(50)]
    w.engine.close()
    for future in futures:
        assert future.done()
        assert future.exception() is None or isinstance(future.exception(), Unavailable)


def test_a_batch_is_planned_while_the_one_before_it_runs(world: Make) -> None:
    w = world(max_batch_requests=1)
    w.overlap()
    for user in "ab":
        w.put(user, 5)
    first, second, again = w.submit("a"), w.submit("b"), w.submit("a")
    w.step()
    assert not first.future.done()
    w.step()
    assert first.future.done() and not second.future.done()
    w.run()
    assert [each.verify().position for each in (first, second, again)] == [5, 5, 5]
    assert again.future.result().gpu_tokens == again.future.result().prefix_tokens


def test_the_user_of_a_batch_under_way_waits_for_it(world: Make) -> None:
    w = world()
    w.overlap()
    w.put("a", 5)
    first = w.submit("a")
    w.step()
    w.append("a", 2)
    second = w.submit("a")
    w.step()
    assert first.future.done() and not second.future.done()
    w.run()
    assert first.verify().encoded_tokens == 7
    assert second.verify().encoded_tokens == 2


def test_one_slow_batch_does_not_doom_those_that_come_after(world: Make) -> None:
    w = world()
    w.put("a", 3)
    w.hook("attention", lambda: setattr(w.clock, "now", w.clock.now + 5))  # as compiling would
    w.score("a")
    w.hook("attention", lambda: None)
    w.engine._core.batches.served = w.engine._core._serve(w.engine.model)
    doomed = w.submit("a", deadline=w.clock() + 0.2)
    w.run()
    assert isinstance(doomed.future.exception(0), DeadlineExceeded)
    w.clock.now += 2
    later = w.submit("a", deadline=w.clock() + 0.2)
    w.run()
    assert later.verify().gpu_tokens > 0


def test_prefetches_do_not_take_the_room_of_scores(world: Make) -> None:
    w = world(max_queue=2)
    for user in "abcd":
        w.put(user, 3)
    prefetches = [w.engine.prefetch(user) for user in "abcd"]
    w.engine._loop.run_inbox()
    score = w.submit("a")
    w.run()
    score.verify()
    refused = [future for future in prefetches if future.exception(0) is not None]
    assert len(refused) == 2
    assert all(isinstance(future.exception(0), ResourceExhausted) for future in refused)
    assert w.value("prefetches_dropped_total") == 2
    assert w.value("rejected_total", "queue_full") == 0


def test_a_prefetch_of_what_is_there_runs_nothing(world: Make) -> None:
    w = world()
    w.put("a", 3)
    w.score("a")
    w.hook("attention", lambda: pytest.fail("a batch of no rows was run"))
    again = w.engine.prefetch("a")
    w.run()
    assert again.result(0).encoded_tokens == 0
    assert again.result(0).gpu_tokens == again.result(0).prefix_tokens
