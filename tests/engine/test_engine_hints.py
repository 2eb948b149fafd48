"""Appends that announce a score: what it finds, what it never costs anybody else, and when nothing is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from engine_world import World
from small_models import CAUSAL, small_model

from mtserve.errors import Cancelled, InvalidArgument, Unavailable
from mtserve.history.memory import MemoryHistory
from mtserve.types import History, ScoreResult

Make = Callable[..., World]
PAGES = 6  # of a user with 21 behaviours, 4 tokens each


def _warm(w: World, users: str, count: int = 21) -> None:
    for user in users:
        w.put(user, count)
        w.score(user)


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_the_score_after_a_hint_encodes_only_candidates(world: Make, changes: dict[str, Any]) -> None:
    w = world(small_model(**changes), gpu_pages=12)
    w.put("a", 18)
    for where in ("nowhere", "on the GPU", "on the host"):
        w.append("a", 1, prefetch=True)
        w.run()
        tokens = w.engine.metrics.distribution("batch_tokens").sum
        result = w.score("a", 3)
        assert result.gpu_tokens == result.prefix_tokens == 2 + result.position, where
        assert w.engine.metrics.distribution("batch_tokens").sum - tokens == 3
        if where == "on the GPU":
            w.evict_from_gpu()
    assert w.value("prefetches_total") == 3
    w.run()
    w.assert_idle()


def test_a_re_cut_announced_by_a_hint_is_encoded_even_without_states_of_the_old(world: Make) -> None:
    w = world()
    w.put("a", w.model.config.max_history)
    w.engine.prefetch("a").cancel()  # the sequence is in memory, its states are not
    w.append("a", 1, prefetch=True)
    w.run()
    result = w.score("a")
    assert result.gpu_tokens == result.prefix_tokens < w.model.config.max_history


def test_a_score_that_comes_first_takes_the_hint_along(world: Make) -> None:
    w = world()
    _warm(w, "a")
    w.append("a", 2, prefetch=True)
    pending = w.submit("a")
    w.step()
    assert pending.verify().encoded_tokens == 2
    assert not w.engine._core.scheduler
    batches = w.value("batches_total")
    w.run()
    assert w.value("batches_total") == batches


def test_without_a_hint_and_with_the_cache_off_nothing_is_brought(world: Make) -> None:
    w, off = world(), world(cache="off")
    for each, hint in ((w, False), (off, True)):
        each.put("a", 5)
        each.engine.prefetch("a").cancel()
        each.append("a", 1, prefetch=hint)
        each.run()
        assert each.value("batches_total") == 0


# Many hints


def test_hints_of_one_user_collapse_into_the_newest(world: Make) -> None:
    w = world()
    _warm(w, "a", 11)
    first = w.engine.prefetch("a")
    for _ in range(5):
        w.append("a", 1, prefetch=True)
    last = w.engine.prefetch("a")
    batches = w.value("batches_total")
    w.run()
    with pytest.raises(Cancelled, match="newer"):
        first.result(0)
    assert last.result(0).encoded_tokens == 5
    assert w.value("batches_total") == batches + 1
    assert (w.value("prefetches_total"), w.value("prefetches_superseded_total")) == (7, 6)
    assert w.value("cancelled_total") == w.value("failed_total") == 0
    assert w.score("a").encoded_tokens == 0


def test_hints_that_arrive_in_the_other_order_leave_the_newer_history(world: Make) -> None:
    w = world()
    _warm(w, "a", 11)
    old = w.engine._sequences.get("a")
    w.append("a", 3)
    newer = w.engine.prefetch("a")
    older = w.engine._encode(old)
    w.run()
    assert newer.result(0).encoded_tokens == 3
    assert isinstance(older.exception(0), Cancelled)


def test_a_full_queue_drops_hints_and_counts_them(world: Make) -> None:
    w = world(max_queue=2)
    _warm(w, "abcd", 5)
    for user in "abcd":
        w.append(user, 1, prefetch=True)  # the mirror checks that each is stored and acknowledged
    pending = [w.submit("a"), w.submit("d")]  # their queue is another
    w.run()
    assert w.value("prefetches_dropped_total") == 2
    assert sum(w.value("rejected_total", reason) for reason in ("queue_full", "invalid")) == 0
    assert [each.verify().position for each in pending] == [6, 6]
    assert [w.score(user).encoded_tokens for user in "bc"] == [0, 1]


def test_a_refused_append_hints_nothing(world: Make) -> None:
    w = world()
    _warm(w, "a", 5)
    with pytest.raises(InvalidArgument):
        w.engine.append("a", w.rows["a"][:1], prefetch=True)  # times must not decrease
    assert w.value("prefetches_total") == 0
    assert not w.step()


# What hints never cost


def _found(result: ScoreResult) -> tuple[int, int, int]:
    return result.gpu_tokens, result.host_tokens, result.encoded_tokens


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("copies", ["at once", "late", "kept back"])
@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_a_flood_of_hints_takes_no_gpu_hit_from_waiting_scores(
    world: Make, changes: dict[str, Any], copies: str, overlap: bool
) -> None:
    """Scores whose prefixes fill the pool together find there what they find without the flood."""
    found: list[list[tuple[int, int, int]]] = []
    for flood in (False, True):
        w = world(
            small_model(**changes), gpu_pages=4 * PAGES, host_pages=400, max_batch_tokens=3, cold_batch_tokens=3
        )  # one score a batch
        _warm(w, "qrstuvwxyz", 5)
        _warm(w, "abcd")
        assert [w.held(user) for user in "qa"] == [(0, 7), (23, 23)]
        if overlap:
            w.overlap()
        mover = w.delay_copies()
        pending = [w.submit(user) for user in "abcd"]
        for turn in range(60):
            for user in "qrstuvwxyz"[: 10 * flood]:
                if len(w.rows[user]) < 12:
                    w.append(user, 1, prefetch=True)
            w.step()
            if copies == "at once" or (copies == "late" and turn % 3 == 2):
                mover.release_all()
            if all(each.future.done() for each in pending):
                break
        found.append([_found(each.verify()) for each in pending])
        mover.release_all()
        w.run()
        mover.release_all()
        w.run()
    assert found[0] == found[1] == [(23, 0, 0)] * 4


def test_a_hint_takes_no_room_that_a_running_copy_holds(world: Make) -> None:
    """A user's pages cannot be evicted while they are saved: those that could be are what a score waits for."""
    w = world(gpu_pages=3 * PAGES + 1, max_batch_tokens=7)
    _warm(w, "xabc")
    mover = w.delay_copies()
    w.append("a", 4)  # one page more, saved after the batch
    pending = [w.submit("a"), w.submit("b", 7), w.submit("c", 7)]  # one a batch
    w.step()
    assert mover.submitted == ["store"]
    w.engine.prefetch("x")
    for _ in range(4):
        w.step()
    assert [_found(each.verify()) for each in pending] == [(23, 0, 4), (23, 0, 0), (23, 0, 0)]
    mover.release_all()
    w.run()
    assert mover.submitted == ["store", "load"]
    mover.release_all()
    w.run()


def test_a_hint_with_a_longer_history_waits_for_room_beside_its_users_score(world: Make) -> None:
    w = world(gpu_pages=4 + PAGES, max_batch_tokens=12)
    _warm(w, "a", 11)
    _warm(w, "b")
    short, other = w.submit("a"), w.submit("b", 10)  # a batch each
    w.append("a", 4, prefetch=True)  # a page more than both leave
    w.step()
    assert _found(short.verify()) == (13, 0, 0)
    w.run()
    assert _found(other.verify()) == (23, 0, 0)
    assert w.score("a").encoded_tokens == 0


def test_a_hint_lengthens_its_users_score_no_more_than_cold_users_may(world: Make) -> None:
    w = world(max_batch_tokens=100, cold_batch_tokens=3)
    _warm(w, "a", 11)
    before = w.engine.metrics.distribution("batch_tokens").sum
    score = w.submit("a", 5)
    w.append("a", 4, prefetch=True)
    w.step()
    assert score.verify().encoded_tokens == 0
    assert w.engine.metrics.distribution("batch_tokens").sum - before == 5
    w.run()
    assert w.score("a").encoded_tokens == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_score_that_comes_while_hints_are_queued_is_in_the_next_batch(world: Make, overlap: bool) -> None:
    w = world(gpu_pages=200, host_pages=400, max_batch_requests=2, max_batch_tokens=30, cold_batch_tokens=20)
    if overlap:
        w.overlap()
    users = "klmnopqrstuvwxyz"
    _warm(w, users, 5)
    _warm(w, "ab")
    w.run()
    for turn in range(12):
        for user in users:
            w.append(user, 1 + 20 * (user == "k" and turn < 2), prefetch=True)  # one too large for any budget
        if turn == 0:
            w.step()
            w.step()
        pending = [w.submit("a"), w.submit("b")]
        for _ in range(1 + overlap):
            w.step()
        assert all(each.future.done() for each in pending), turn
        assert [_found(each.verify()) for each in pending] == [(23, 0, 0)] * 2
    w.run()
    assert w.value("prefetches_superseded_total") > 0
    assert all(w.score(user).encoded_tokens == 0 for user in users)


def test_an_oversized_hint_never_takes_the_turn_of_scores(world: Make) -> None:
    w = world(max_batch_tokens=40, cold_batch_tokens=10, cold_after=5)
    _warm(w, "a", 3)
    w.put("k", 40)
    hint = w.engine.prefetch("k")
    for _ in range(10):
        pending = w.submit("a")
        w.step()
        pending.verify()
    assert not hint.done()
    w.step()
    assert hint.result(0).encoded_tokens == 42


def test_hints_fill_no_more_of_a_batch_than_cold_users_may(world: Make) -> None:
    w = world(gpu_pages=400, max_batch_tokens=1000, cold_batch_tokens=12)
    _warm(w, "abcdefgh", 9)
    for user in "bcdefgh":
        w.append(user, 5, prefetch=True)
    before = w.engine.metrics.distribution("batch_tokens").sum
    w.submit("a", 3)
    w.step()
    assert w.engine.metrics.distribution("batch_tokens").sum - before == 3 + 12
    w.run()


def test_hints_on_their_way_to_the_queue_do_not_fill_it_for_scores(world: Make) -> None:
    w = world(max_queue=3)
    _warm(w, "abcde", 4)
    for user in "bcde":
        w.append(user, 1, prefetch=True)
    pending = [w.submit("a") for _ in range(3)]
    w.run()
    assert all(each.verify().encoded_tokens == 0 for each in pending)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_hint_whose_states_are_still_loading_starts_no_batch_that_waits_for_them(world: Make, overlap: bool) -> None:
    w = world(gpu_pages=14)
    _warm(w, "a")
    w.evict_from_gpu()
    if overlap:
        w.overlap()
    mover = w.delay_copies(near_loads=True)
    hint = w.engine.prefetch("a")
    batches = w.value("batches_total")
    for _ in range(5):
        w.step()
    assert mover.submitted == ["load"]
    assert (mover.overlapped, len(mover.jobs), hint.done()) == (0, 1, False)
    assert w.value("batches_total") == batches
    mover.release()
    w.run()
    assert hint.result(0).encoded_tokens == 0


# Histories that are not in memory


class SlowHistory(MemoryHistory):
    """Reads wait while `closed`."""

    def __init__(self, schema: Any) -> None:
        super().__init__(schema)
        self.reading, self.open = threading.Semaphore(0), threading.Event()

    def read(self, user_id: str, last: int | None = None) -> History:
        self.reading.release()
        assert self.open.wait(10)
        return super().read(user_id, last)


def _slow(world: Make, **config: Any) -> tuple[World, SlowHistory]:
    model = small_model()
    history = SlowHistory(model.schema)
    return world(model, history=history, start=True, snapshot_cache="0", **config), history


def test_no_append_waits_for_a_history_to_be_read(world: Make) -> None:
    w, history = _slow(world, max_queue=2)
    for user in "abcde":
        w.put(user, 5)
    w.append("a", 1, prefetch=True)
    assert history.reading.acquire(timeout=10)  # a's, on a thread of its own
    for user in "bbbcde":
        w.append(user, 1, prefetch=True)
    assert w.value("prefetches_superseded_total") == 2
    assert w.value("prefetches_dropped_total") == 2  # two users wait already
    w.append("a", 1, prefetch=True)  # its read may have missed this, but there is no room
    assert w.value("prefetches_dropped_total") == 3
    history.open.set()
    for user in "bc":
        assert history.reading.acquire(timeout=10), user
    w.engine.close()
    assert w.value("failed_total") == 0


def test_closing_drops_hints_that_wait_for_their_history(world: Make) -> None:
    w, history = _slow(world)
    for user in "ab":
        w.put(user, 5)
        w.append(user, 1, prefetch=True)
    assert history.reading.acquire(timeout=10)
    closing = threading.Thread(target=w.engine.close)
    closing.start()
    history.open.set()
    closing.join(10)
    assert not closing.is_alive()
    assert not history.reading.acquire(blocking=False)  # b's was never read
    w.engine._hints.add("b")
    assert not history.reading.acquire(blocking=False)


def test_hints_of_deleted_users_and_of_a_draining_engine_are_forgotten(
    world: Make, caplog: pytest.LogCaptureFixture
) -> None:
    w = world()
    w.put("a", 5)
    w.engine._hints.add("nobody")
    w.engine.drain(5)
    w.engine._hints.add("a")
    assert not caplog.records
    assert not w.engine._core.scheduler


def test_a_hint_whose_history_cannot_be_read_is_logged_and_the_append_stands(
    world: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    w.put("a", 5)

    def broken(user_id: str, last: int | None = None) -> History:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(w.engine.history, "read", broken)
        w.append("a", 1, prefetch=True)
    assert "the hint of user 'a' failed" in caplog.text
    assert w.score("a").position == 6


def test_an_append_stands_when_the_engine_closes_before_its_hint_is_queued(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    _warm(w, "a", 5)

    def closed(*_: Any, **__: Any) -> None:
        raise Unavailable("the engine is closed")

    monkeypatch.setattr(w.engine._loop, "post", closed)
    w.append("a", 1, prefetch=True)
    assert len(w.engine.history.read("a").behaviours) == 6
