"""The index case by case: prefixes, eviction, tickets, corrections, invalidation, limits."""

from __future__ import annotations

import numpy as np
import pytest
from tiered_index_pool import A, B, Pool, chain_of

from mtserve.cache.index import Busy, Match, TieredIndex
from mtserve.errors import CorruptState, FailedPrecondition, InvalidArgument


def test_a_survey_says_of_each_what_lookup_and_is_busy_say():
    pool = Pool()
    pool.put(a=A[:10], b=B[:6])
    pool.store("a")
    load = pool.begin(b=B[:8])[0]
    before = pool.index.stats(), pool.index.users()
    users, chains = ["a", "b", "nobody", "a"], [A, B[:3], A, B]
    found = pool.index.survey(users, chains)
    for user, chain, present in zip(users, chains, found, strict=True):
        match, busy = pool.index.lookup(user, chain), pool.index.is_busy(user)
        assert (present.gpu_tokens, present.host_tokens) == (match.gpu_tokens, match.host_tokens)
        assert (present.loading, present.in_batch) == (busy.loading, busy.in_batch)
    assert [(each.gpu_tokens, each.host_tokens) for each in found] == [(10, 10), (3, 0), (0, 0), (0, 0)]
    assert [each.in_batch for each in found] == [False, True, False, False]
    assert (pool.index.stats(), pool.index.users()) == before
    assert pool.index.survey([], []) == []
    pool.index.end_batch(load, False)


def test_a_survey_sees_a_load_under_way():
    pool = Pool(gpu=3)
    pool.put(a=A[:8])
    pool.store("a")
    pool.put(b=B[:12])  # pushes a off the GPU
    load = pool.index.begin_load("a", A[:8])
    (present,) = pool.index.survey(["a"], [A[:8]])
    assert (present.gpu_tokens, present.host_tokens, present.loading, present.in_batch) == (0, 8, True, False)
    asked = pool.index.survey(["a", "a", "b", "nobody"], [A[:5], B, B, A])
    assert present.arriving_tokens == 8
    assert [each.arriving_tokens for each in asked] == [5, 0, 0, 0]
    pool.index.end_load(load.ticket, True)
    assert pool.index.survey(["a"], [A[:8]])[0].arriving_tokens == 0


@pytest.mark.parametrize(
    ("users", "chains", "field"),
    [(["a"], [], "chains"), (["a", 3], [A, A], "users"), (["a"], [A.astype(np.int32)], "chains"), ([""], [A], "user")],
)
def test_a_malformed_survey_is_refused(users, chains, field):
    with pytest.raises(InvalidArgument) as raised:
        Pool().index.survey(users, chains)
    assert raised.value.field == field


def test_a_batch_is_found_only_after_its_success():
    pool = Pool()
    ticket, cached, stored, table = pool.begin(a=A[:10])
    assert (cached, stored, table) == ([0], [10], [[0, 1, 2] + [-1] * 7])
    assert pool.index.lookup("a", A) == Match(0, 0)
    assert pool.index.is_busy("a") == Busy(loading=False, storing=False, in_batch=True)
    pool.index.end_batch(ticket, True)
    assert pool.index.lookup("a", A) == Match(10, 0)
    assert pool.index.lookup("a", A[:7]) == Match(7, 0)
    assert pool.index.lookup("a", B) == Match(0, 0)
    assert not pool.index.is_busy("a").any
    assert pool.begin(a=A[:13])[1:3] == ([10], [13])


def test_a_failed_batch_leaves_everything_as_it_was():
    pool = Pool()
    pool.put(a=A[:6])
    before = pool.index.stats()
    pool.put(a=A[:20], b=B[:3], success=False)
    assert pool.index.stats() == before
    assert pool.tokens() == {"a": (6, 0)}


def test_lookup_has_no_side_effects():
    pool = Pool(gpu=4)
    pool.put(a=A[:8])
    pool.put(b=B[:8])
    before = pool.index.stats(), pool.index.users()
    for _ in range(5):
        pool.index.lookup("a", A)
        pool.index.lookup("stranger", A)
        pool.index.is_busy("a")
    assert (pool.index.stats(), pool.index.users()) == before
    pool.put(c=chain_of(range(4)))
    assert pool.tokens()["a"] == (4, 0)  # still the least recently used


def test_golden_lru_order():
    pool = Pool(gpu=6)
    for name in "abcdef":
        pool.put(**{name: chain_of([ord(name)])})
    pool.put(b=chain_of([ord("b")]))
    pool.put(a=chain_of([ord("a")]))
    order = []
    for number in range(6):
        before = set(pool.tokens())
        pool.put(**{f"new{number}": chain_of([number])})
        order += before - set(pool.tokens())
    assert order == ["c", "d", "e", "f", "b", "a"]


def test_evicts_exactly_the_shortfall_from_the_tail():
    pool = Pool(gpu=8)
    pool.put(a=A[:14])  # 4 pages, the last half full
    pool.put(b=B[:12])  # 3
    ticket, _, stored, _ = pool.begin(c=chain_of(range(9)))  # needs 3, 1 is free
    assert stored == [9]
    assert pool.tokens()["a"] == (8, 0)
    assert pool.index.lookup("a", A) == Match(8, 0)
    stats = pool.index.stats().gpu
    assert (stats.evicted_pages, stats.evicted_users, stats.free) == (2, 0, 0)
    pool.index.end_batch(ticket, True)
    pool.put(d=chain_of(range(50, 62)))
    assert "a" not in pool.tokens()
    assert pool.index.stats().gpu.evicted_users == 1


def test_a_batch_does_not_evict_its_own_and_stores_what_fits():
    pool = Pool(gpu=4)
    pool.put(a=A[:8])
    ticket, cached, stored, table = pool.begin(b=B[:30], a=A[:12])
    assert (cached, stored) == ([0, 8], [8, 8])
    assert len({*table[0][:2], *table[1][:2]}) == 4
    assert table[0][2] == table[1][2] == -1
    other = pool.begin(c=chain_of(range(5)))
    assert other[2] == [0]
    pool.index.end_batch(other[0], True)
    pool.index.end_batch(ticket, True)
    assert pool.tokens() == {"b": (8, 0), "a": (8, 0)}


def test_a_correction_cuts_both_tiers_to_the_common_prefix_in_tokens():
    pool = Pool()
    pool.put(a=A[:12])
    pool.store("a")
    fixed = chain_of([0, 1, 2, 3, 4, 99, 98])
    assert pool.index.lookup("a", fixed) == Match(5, 5)
    assert pool.tokens() == {"a": (12, 12)}  # asking changed nothing
    ticket, cached, stored, _ = pool.begin(a=fixed)
    assert (cached, stored) == ([5], [7])
    pool.index.end_batch(ticket, False)
    assert pool.tokens() == {"a": (5, 5)}
    assert pool.index.stats().corrections == 1
    pool.put(a=A[:3])  # merely an earlier moment of the same history
    assert pool.tokens() == {"a": (5, 5)}


def test_a_correction_during_a_store_limits_what_it_publishes():
    pool = Pool()
    pool.put(a=A[:12])
    plan = pool.index.begin_store("a")
    assert plan is not None
    assert plan.tokens == 12
    ticket, cached, _, table = pool.begin(a=chain_of([0, 1, 2, 3, 4, 5, 77, 78, 79]))
    assert cached == [6]
    assert table[0][:3] == plan.gpu_pages.tolist()
    pool.index.end_batch(ticket, True)
    assert pool.tokens() == {"a": (9, 0)}
    pool.index.end_store(plan.ticket, True)
    pool.index.check()
    assert pool.tokens() == {"a": (9, 6)}


def test_store_and_load_cover_the_missing_pages_and_the_half_filled_one():
    pool = Pool(gpu=4, host=8)
    pool.put(a=A[:6])
    pool.store("a")
    pool.put(a=A[:14])
    plan = pool.index.begin_store("a")
    assert plan is not None
    assert (plan.first_token, plan.tokens, len(plan.gpu_pages)) == (6, 14, 3)
    assert pool.index.begin_store("a") is None
    assert pool.tokens() == {"a": (14, 6)}
    pool.index.end_store(plan.ticket, True)
    pool.put(b=B[:9])  # takes three of a's four pages
    assert pool.tokens() == {"a": (4, 14), "b": (9, 0)}
    load = pool.index.begin_load("a", A[:10])
    assert load is not None
    assert (load.first_token, load.tokens, load.host_pages.tolist()) == (4, 10, plan.host_pages.tolist()[:2])
    assert pool.index.lookup("a", A) == Match(4, 14)
    assert pool.index.begin_load("a", A) is None
    assert pool.index.begin_store("a") is None
    pool.index.end_load(load.ticket, True)
    pool.index.check()
    assert pool.tokens()["a"] == (10, 14)


def test_a_failed_copy_leaves_everything_as_it_was():
    pool = Pool(gpu=4)
    pool.put(a=A[:12])
    before = pool.index.stats()
    plan = pool.index.begin_store("a")
    assert plan is not None
    pool.index.end_store(plan.ticket, False)
    assert pool.index.stats() == before
    pool.store("a")
    pool.put(b=B[:16])
    pool.index.invalidate("b")
    before = pool.index.stats()
    load = pool.index.begin_load("a", A)
    assert load is not None
    assert pool.index.stats().gpu.in_flight == 4  # with room for the rest of the chain
    pool.index.end_load(load.ticket, False)
    pool.index.check()
    assert pool.index.stats() == before
    assert pool.tokens() == {"a": (0, 12)}


def test_copies_are_partial_when_room_is_short_and_none_without_any():
    pool = Pool(gpu=6, host=2)
    pool.put(a=A[:12])
    plan = pool.index.begin_store("a")
    assert plan is not None
    assert plan.tokens == 8
    pool.put(b=B[:4])
    assert pool.index.begin_store("b") is None  # the host is full of pages in flight
    pool.index.end_store(plan.ticket, True)
    assert Pool(host=0).index.begin_store("a") is None
    empty = Pool(host=0)
    empty.put(a=A[:4])
    assert empty.index.begin_store("a") is None


def test_a_load_is_partial_when_room_is_short_and_none_without_any():
    pool = Pool(gpu=4, host=4)
    pool.put(a=A[:14])
    pool.store("a")
    blocker = pool.begin(b=B[:10])[0]
    assert pool.tokens()["a"] == (4, 14)
    pool.put(c=chain_of(range(50, 54)))  # the last page a had
    assert pool.tokens()["a"] == (0, 14)
    load = pool.index.begin_load("a", A)
    assert load is not None
    assert (load.first_token, load.tokens, len(load.gpu_pages)) == (0, 4, 1)
    pool.index.end_load(load.ticket, True)
    pinned = pool.begin(a=A[:4])[0]
    assert pool.index.begin_load("a", A) is None  # in a batch
    pool.index.end_batch(pinned, True)
    before = pool.index.stats()
    assert pool.index.begin_load("a", A) is None  # every other page is in flight
    assert pool.index.stats() == before
    pool.index.end_batch(blocker, False)
    pool.index.check()
    load = pool.index.begin_load("a", A)
    assert load is not None
    assert (load.first_token, load.tokens, len(load.gpu_pages)) == (4, 14, 3)


def test_pages_in_flight_are_never_evicted():
    pool = Pool(gpu=4, host=4)
    pool.put(a=A[:8])
    plan = pool.index.begin_store("a")
    assert plan is not None
    assert pool.begin(b=B[:16])[2] == [8]
    assert pool.tokens()["a"] == (8, 0)


def test_a_stale_job_cannot_publish():
    pool = Pool()
    pool.put(a=A[:8])
    plan = pool.index.begin_store("a")
    ticket = pool.begin(a=A[:12])[0]
    assert plan is not None
    assert pool.index.invalidate("a")
    pool.index.check()
    assert pool.index.lookup("a", A) == Match(0, 0)
    assert not pool.index.invalidate("a")
    stats = pool.index.stats()
    assert (stats.users, stats.detached, stats.gpu.in_flight, stats.host.in_flight) == (0, 1, 3, 2)
    second, cached, _, table = pool.begin(a=B[:6])
    assert cached == [0]
    assert not set(table[0][:2]) & set(plan.gpu_pages.tolist())
    pool.index.end_batch(ticket, True)
    pool.index.end_store(plan.ticket, True)
    pool.index.check()
    assert pool.tokens() == {"a": (0, 0)}
    pool.index.end_batch(second, True)
    assert pool.tokens() == {"a": (6, 0)}
    assert pool.index.stats().detached == 0
    assert pool.index.stats().gpu.in_flight == 0


def test_invalidate_all_with_everything_in_flight():
    pool = Pool(gpu=8, host=8)
    pool.put(a=A[:8], b=B[:8])
    pool.store("b")
    tickets = [pool.begin(c=A[:4])[0]]
    plan = pool.index.begin_store("a")
    assert plan is not None
    assert pool.index.invalidate_all() == 3
    pool.index.check()
    pool.index.end_store(plan.ticket, True)
    pool.index.end_batch(tickets[0], True)
    pool.index.check()
    stats = pool.index.stats()
    assert pool.tokens() == {}
    assert stats.gpu.free == stats.host.free == 8
    assert stats.invalidated == 3


def test_a_ticket_ends_once():
    pool = Pool()
    ticket = pool.begin(a=A[:8])[0]
    pool.index.end_batch(ticket, True)
    plan = pool.index.begin_store("a")
    assert plan is not None
    before = pool.index.stats(), pool.index.users()
    for end, wrong in [
        (pool.index.end_batch, ticket),
        (pool.index.end_batch, plan.ticket),
        (pool.index.end_load, plan.ticket),
        (pool.index.end_store, 10**12),
        (pool.index.end_store, 0),
    ]:
        with pytest.raises(FailedPrecondition, match="not an open"):
            end(wrong, True)
    assert (pool.index.stats(), pool.index.users()) == before
    pool.index.end_store(plan.ticket, True)
    with pytest.raises(FailedPrecondition, match="ended already"):
        pool.index.end_store(plan.ticket, True)
    assert pool.tokens() == {"a": (8, 8)}


def test_a_refused_batch_changes_nothing():
    pool = Pool()
    pool.put(a=A[:8])
    ticket = pool.begin(b=B[:4])[0]
    before = pool.index.stats(), pool.index.users()
    out = np.zeros(2, np.int32), np.zeros(2, np.int32), np.zeros((2, 3), np.int32)
    short = chain_of([5])
    for users, chains, error, field in [
        (["a", "a"], [A[:1], A[:1]], InvalidArgument, r"users\[1\]"),
        (["x", "x"], [A[:1], A[:1]], InvalidArgument, r"users\[1\]"),
        (["a", "b"], [short, B[:4]], FailedPrecondition, r"users\[1\]"),
        (["a", "c"], [short, A[:13]], InvalidArgument, r"chains\[1\]"),
        (["a", ""], [short, short], InvalidArgument, r"users\[1\]"),
        (["a", "é" * 129], [short, short], InvalidArgument, r"users\[1\]"),
        (["a", "\ud800"], [short, short], InvalidArgument, "users"),
        (["a", 7], [short, short], InvalidArgument, "users"),
        (["a", "c"], [short], InvalidArgument, "chains"),
        (["a", "c"], [short, short.astype(np.int64)], InvalidArgument, "chains"),
        (["a"], [short], InvalidArgument, "cached"),
    ]:
        with pytest.raises(error, match=field):
            pool.index.begin_batch(users, chains, *out)
        assert (pool.index.stats(), pool.index.users()) == before
        pool.index.check()
    pool.index.end_batch(ticket, True)
    assert pool.begin(a=A[:9], b=B[:4])[1] == [8, 4]


def test_limits_name_their_field():
    for arguments, field in [
        ((0, 1, 1), "page_tokens"),
        ((2**17, 1, 1), "page_tokens"),
        ((4, -1, 1), "pages"),
        ((4, 1, 2**31), "pages"),
        ((4, 1, 1, "mru"), "policy"),
    ]:
        with pytest.raises(InvalidArgument, match=field):
            TieredIndex(*arguments)
    index = Pool().index
    with pytest.raises(InvalidArgument, match="chain"):
        index.lookup("a", np.zeros(2**24 + 1, np.uint64))
    with pytest.raises(InvalidArgument, match="user"):
        index.invalidate("")
    with pytest.raises(InvalidArgument, match="tier"):
        index.drain_freed("disk")
    assert index.invalidate("é" * 128) is False


def test_freed_pages_are_reported_when_asked_for():
    pool = Pool(gpu=4, track_freed=True)
    pool.put(a=A[:12])
    assert pool.index.drain_freed("gpu").tolist() == []
    pool.put(b=B[:8])
    assert pool.index.drain_freed("gpu").tolist() == [2]
    pool.index.invalidate("a")
    assert sorted(pool.index.drain_freed("gpu").tolist()) == [0, 1]
    assert pool.index.drain_freed("host").tolist() == []


def test_a_history_lies_in_neighbouring_pages_when_there_is_room():
    pool = Pool(gpu=8)
    pool.put(a=A[:8])
    assert pool.begin(b=B[:8], a=A[:12])[3][0][:2] == [2, 3]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("leaked page", "gpu"),
        ("shared page", "two places"),
        ("freed page", "held and free"),
        ("foreign page", "outside the tier"),
        ("long tokens", "chain"),
        ("short chain", "chain"),
        ("unlisted", "policy"),
        ("used counter", "used pages"),
        ("stray pin", "tickets"),
        ("unfindable", "table"),
    ],
)
def test_check_finds_what_is_broken(what: str, named: str):
    pool = Pool()
    pool.put(a=A[:8], b=B[:8])
    pool.index._sabotage(what)
    with pytest.raises(CorruptState, match=named):
        pool.index.check()
