"""Many threads: group commit, one winner for each position, one history or the other."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from history_rows import SCHEMA, embedded, features, outcome, rows

from mtserve.errors import FailedPrecondition, InvalidArgument, Unavailable
from mtserve.history import Append, HistoryStore
from mtserve.history.embedded import EmbeddedHistory
from mtserve.history.group import MAX_GROUP, GroupCommit, Ticket, _wait
from mtserve.history.sqlite import SqliteStorage
from mtserve.history.transaction import Transaction


class GatedStorage(SqliteStorage):
    """Holds the writer back while `gate` is clear, and fails the commits it is told to fail."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self.gate.set()
        self.commits = 0
        self.failing = range(0)

    def fail_next(self, count: int, after: int = 0) -> None:
        self.failing = range(self.commits + after, self.commits + after + count)

    @contextmanager
    def writing(self) -> Iterator[Any]:
        assert self.gate.wait(30)
        with super().writing() as writer:
            yield writer
            self.commits += 1
            if self.commits - 1 in self.failing:
                raise OSError("the disk is gone")


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[tuple[EmbeddedHistory, GatedStorage]]:
    storage = GatedStorage(tmp_path)
    with EmbeddedHistory(SCHEMA, storage, segment_rows=4) as store:
        yield store, storage
        store.check()


def together(
    store: EmbeddedHistory, storage: GatedStorage, first: Callable[[], Any], calls: list[Callable[[], Any]]
) -> list[Any]:
    """Run `first`, and while its commit is held back, `calls`: they must form the next group. Their futures."""
    before = store.commits
    storage.gate.clear()
    with ThreadPoolExecutor(len(calls) + 1) as pool:
        opener = pool.submit(first)
        spin(lambda: store._group._leading and not store._group._waiting)
        futures = []
        for number, call in enumerate(calls):
            futures.append(pool.submit(call))
            spin(lambda number=number: len(store._group._waiting) == number + 1)
        assert store.commits == before
        storage.gate.set()
    opener.result()
    return futures


def spin(condition: Callable[[], Any]) -> None:
    for _ in range(30_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("threads did not get there")


def test_concurrent_appends_share_a_commit(gated: tuple[EmbeddedHistory, GatedStorage]) -> None:
    store, storage = gated
    calls = [lambda n=n: store.append(f"u{n % 5}", rows(n)) for n in range(20)]
    futures = together(store, storage, lambda: store.append("x", rows(1)), calls)
    assert store.commits == 2
    assert [future.result() for future in futures] == [1 + n // 5 for n in range(20)]
    assert store.read("u3").behaviours["time_ms"].tolist() == [3, 8, 13, 18]


def test_refused_member_leaves_the_others(gated: tuple[EmbeddedHistory, GatedStorage]) -> None:
    store, storage = gated
    store.append("u", rows(10))
    calls = [
        lambda: store.append("u", rows(11)),
        lambda: store.append("u", rows(5)),
        lambda: store.append("u", rows(12), 9),
        lambda: store.append("v", rows(1)),
        lambda: store.put_user("w", None, rows(1, 2, 3, 4, 5)),
        lambda: store.truncate("w", 4),
        lambda: store.append("w", rows(7)),
        lambda: store.delete("v"),
    ]
    before = store.commits
    futures = together(store, storage, lambda: store.append("x", rows(1)), calls)
    assert store.commits == before + 2
    errors = [type(future.exception()) for future in futures[1:3]]
    assert errors == [InvalidArgument, FailedPrecondition]
    assert [futures[n].result() for n in (0, 3, 4, 5, 6, 7)] == [2, 1, 5, 4, 5, True]
    assert sorted(store.users()) == ["u", "w", "x"]
    assert store.read("w").behaviours["time_ms"].tolist() == [1, 2, 3, 4, 7]


def test_deleted_and_put_again_in_one_group(gated: tuple[EmbeddedHistory, GatedStorage]) -> None:
    store, storage = gated
    store.append("u", rows(1, 2))
    calls = [
        lambda: store.append("u", rows(3, item=30)),
        lambda: store.delete("u"),
        lambda: store.put_user("u", features(1)),
        lambda: store.append("u", rows(0, item=50), 0),
        lambda: store.put_user("v", None, rows(1, 2, 3)),
        lambda: store.drop_before("v", 3),
        lambda: store.put_user("v", None, rows(0, item=70)),
        lambda: store.append("v", rows(5, item=80)),
    ]
    futures = together(store, storage, lambda: store.append("x", rows(1)), calls)
    assert [future.result() for future in futures] == [3, True, 0, 1, 3, 0, 1, 2]
    assert store.read("u").behaviours["item"].tolist() == [50]
    assert store.read("v").behaviours["item"].tolist() == [70, 80]


def test_poisoned_member_fails_alone(
    gated: tuple[EmbeddedHistory, GatedStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, storage = gated
    honest = Transaction.append

    def append(self: Transaction, append: Append) -> int:
        position = honest(self, append)
        if append.user_id == "poison":
            raise RuntimeError("after it changed the transaction")
        return position

    monkeypatch.setattr(Transaction, "append", append)
    names = ["a", "b", "poison", "c"]
    calls = [lambda name=name: store.append(name, rows(1)) for name in names]
    futures = together(store, storage, lambda: store.append("x", rows(1)), calls)
    assert isinstance(futures[2].exception(), RuntimeError)
    assert [futures[n].result() for n in (0, 1, 3)] == [1, 1, 1]
    assert sorted(store.users()) == ["a", "b", "c", "x"]


def test_failed_commit_acknowledges_nothing(gated: tuple[EmbeddedHistory, GatedStorage]) -> None:
    store, storage = gated
    store.append("a", rows(1))
    storage.fail_next(1)
    with pytest.raises(OSError, match="disk is gone"):
        store.append("a", rows(2))
    assert store.position("a") == 1
    storage.fail_next(1)
    with pytest.raises(OSError, match="disk is gone"):
        store.append_many([Append("a", rows(2)), Append("b", rows(2))])
    assert (store.position("a"), store.count()) == (1, 1)
    assert store.append("a", rows(2), 1) == 2


def test_failed_group_is_tried_one_by_one(gated: tuple[EmbeddedHistory, GatedStorage]) -> None:
    store, storage = gated
    storage.fail_next(2, after=1)  # the group's commit, then that of its first member alone
    calls = [lambda name=name: store.append(name, rows(5)) for name in ("a", "b", "c")]
    futures = together(store, storage, lambda: store.append("x", rows(1)), calls)
    assert isinstance(futures[0].exception(), OSError)
    assert [future.result() for future in futures[1:]] == [1, 1]
    assert sorted(store.users()) == ["b", "c", "x"]


def test_append_many_is_one_commit(tmp_path: Path) -> None:
    with embedded(tmp_path) as store:
        results = store.append_many([Append(f"u{n % 7}", rows(n)) for n in range(50)])
        assert results == [1 + n // 7 for n in range(50)]
        assert store.commits == 1


def test_one_winner_for_each_position(store: HistoryStore) -> None:
    start = threading.Barrier(8)
    wins: list[list[int]] = [[] for _ in range(8)]

    def race(me: int) -> None:
        start.wait()
        position = 0
        while position < 40:
            result = outcome(lambda at=position: store.append("u", rows(at, item=me), at))
            if isinstance(result, int):
                wins[me].append(position)
                position = result
            else:
                assert isinstance(result, FailedPrecondition)
                assert result.position > position
                position = result.position

    run_all(race, 8)
    found = store.read("u").behaviours
    assert found["time_ms"].tolist() == list(range(40))
    assert sorted(position for won in wins for position in won) == list(range(40))
    for me, won in enumerate(wins):
        assert all(found["item"][position] == me for position in won)


def test_times_are_checked_against_what_is_stored(store: HistoryStore) -> None:
    def work(me: int) -> None:
        for time_ms in range(me, 200, 8):
            result = outcome(lambda time_ms=time_ms: store.append("u", rows(time_ms)))
            assert isinstance(result, int) or result.field == "behaviours[0].time_ms"

    run_all(work, 8)
    times = store.read("u").behaviours["time_ms"].tolist()
    assert times == sorted(times)
    assert times[-1] == 199


def test_a_read_sees_one_history_or_the_other(store: HistoryStore) -> None:
    store.put_user("u", None, rows(*range(9), item=1000))
    done = threading.Event()

    def write() -> None:
        for turn in range(2, 60):
            store.put_user("u", None, rows(*range(5 + turn % 13), item=1000 * turn))
            store.truncate("u", 5 + turn % 13 - 3)
        done.set()

    def read() -> None:
        while not done.is_set():
            found = store.read("u").behaviours["item"]
            turn = int(found[0]) // 1000
            assert found.tolist() == list(range(1000 * turn, 1000 * turn + len(found)))
            assert turn == 1 or len(found) in (5 + turn % 13, 5 + turn % 13 - 3)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(write), *(pool.submit(read) for _ in range(3))]
        for future in futures:
            future.result(timeout=60)


def test_close_waits_for_changes_under_way(gated: tuple[EmbeddedHistory, GatedStorage]) -> None:
    store, storage = gated
    store.append("a", rows(1))
    storage.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(store.append, "a", rows(2))
        spin(lambda: store._group._leading and not store._group._waiting)
        queued = pool.submit(store.append, "a", rows(3))
        spin(lambda: len(store._group._waiting) == 1)
        closing = pool.submit(store.close)
        spin(lambda: store._closed)
        assert not closing.done()
        storage.gate.set()
        assert (running.result(), queued.result(), closing.result()) == (2, 3, None)
    with pytest.raises(Unavailable):
        store.append("a", rows(4))
    store.check = lambda: None  # type: ignore[method-assign]  # the fixture's own check of an open store


def test_group_survives_whatever_hits_its_leader() -> None:
    seen: list[int] = []

    def commit(tickets: list[Ticket]) -> None:
        seen.append(len(tickets))
        if len(seen) == 1:
            raise KeyboardInterrupt
        for ticket in tickets:
            ticket.result = ticket.change(None)

    group = GroupCommit(commit)
    with pytest.raises(KeyboardInterrupt):
        group.submit(lambda _: 1)
    assert group.submit(lambda _: 2) == 2
    group.close()
    with pytest.raises(Unavailable):
        group.submit(lambda _: 3)
    assert seen == [1, 1]


def test_interrupted_follower_still_leads_when_its_turn_comes() -> None:
    hold = threading.Event()

    def commit(tickets: list[Ticket]) -> None:
        assert hold.wait(30)
        for ticket in tickets:
            ticket.result = ticket.change(None)

    group, done = GroupCommit(commit), []

    def interrupt() -> None:
        spin(lambda: group._waiting)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        hold.set()

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(group.submit, lambda _: done.append("leader"))
        spin(lambda: group._leading and not group._waiting)
        helper = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            group.submit(lambda _: done.append("main"))
        leader.result(), helper.result()
    assert done == ["leader", "main"]
    assert group.submit(lambda _: 3) == 3


@pytest.mark.parametrize("taken", [True, False])
def test_an_interrupt_just_as_the_call_comes_loses_neither(taken: bool) -> None:
    ticket = Ticket(lambda _: None)
    lock = ticket.wake

    class Interrupted:
        def acquire(self, blocking: bool = True) -> bool:
            if not blocking:
                return lock.acquire(blocking=False)
            ticket.called = True
            lock.release()
            if taken:
                lock.acquire()
            raise KeyboardInterrupt

    ticket.wake = Interrupted()  # type: ignore[assignment]
    assert isinstance(_wait(ticket), KeyboardInterrupt)
    assert lock.locked()  # so that the ticket can be called once more, when it has led


def test_groups_are_bounded() -> None:
    hold, sizes = threading.Event(), []

    def commit(tickets: list[Ticket]) -> None:
        assert hold.wait(30)
        sizes.append(len(tickets))
        for ticket in tickets:
            ticket.result = ticket.change(None)

    group = GroupCommit(commit)
    for number in range(MAX_GROUP + 5):  # tickets of callers that wait elsewhere
        group._waiting.append(Ticket(lambda _, number=number: number))
    hold.set()
    with group._lock:
        group._leading = True
    group._lead()
    assert sizes == [MAX_GROUP]
    assert len(group._waiting) == 5


def run_all(work: Callable[[int], None], threads: int) -> None:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet in the middle of everything
    try:
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(work, number) for number in range(threads)]:
                future.result(timeout=60)
    finally:
        sys.setswitchinterval(usual)
