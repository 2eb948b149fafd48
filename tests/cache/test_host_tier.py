"""What is saved to the host: full pages or tails, a number of pages at a time, in a tier that grows; and what was not."""

from __future__ import annotations

import pytest
from tiered_index_pool import A, B, Pool, chain_of

from mtserve.cache.index import Busy
from mtserve.errors import InvalidArgument

IDLE = Busy(loading=False, storing=False, in_batch=False)


def three() -> Pool:
    """Users a with three GPU pages, b with one, c with two."""
    pool = Pool()
    pool.put(a=A[:11], b=B[:3], c=chain_of(range(200, 208)))
    return pool


def test_without_the_tail_only_full_pages_are_stored():
    pool = three()
    stores, unasked = pool.index.begin_stores(["a", "b", "nobody", "c"], tail=False)
    assert [(store.user, store.first_token, store.tokens, len(store.gpu_pages)) for store in stores] == [
        ("a", 0, 8, 2), ("c", 0, 8, 2),
    ]  # fmt: skip
    assert unasked == []
    assert pool.index.begin_stores(["a", "c"], tail=True) == ([], [])  # under way
    for store in stores:
        pool.index.end_store(store.ticket, True)
    assert pool.index.begin_stores(["a", "c"], tail=False) == ([], [])
    rest, _ = pool.index.begin_stores(["a", "b", "c"])
    assert [(store.user, store.first_token, store.tokens) for store in rest] == [("a", 8, 11), ("b", 0, 3)]
    for store in rest:
        pool.index.end_store(store.ticket, True)
    pool.index.check()


@pytest.mark.parametrize(
    ("pages", "begun", "unasked"),
    [
        (0, [], ["nobody", "a", "b", "c"]),
        (1, ["a"], ["b", "c"]),
        (3, ["a"], ["b", "c"]),
        (4, ["a", "b"], ["c"]),
        (5, ["a", "b", "c"], []),
        (6, ["a", "b", "c"], []),
        (2**31 - 1, ["a", "b", "c"], []),
    ],
)
def test_stores_stop_once_enough_pages_are_planned(pages: int, begun: list[str], unasked: list[str]):
    pool = three()
    stores, left = pool.index.begin_stores(["nobody", "a", "b", "c"], pages=pages)
    assert [store.user for store in stores] == begun
    assert left == unasked
    assert all(pool.index.is_busy(user) == IDLE for user in unasked)
    assert pool.index.stats().stores_in_flight == len(begun)
    pool.index.check()


def test_users_with_nothing_to_save_cost_no_pages():
    pool = three()
    pool.store("a")
    stores, left = pool.index.begin_stores(["a", "nobody", "b", "b", "c"], pages=1)
    assert [store.user for store in stores] == ["b"]
    assert left == ["b", "c"]


def test_pages_count_as_they_are_copied_the_half_filled_one_again():
    pool = Pool()
    pool.put(a=A[:6])
    pool.store("a")
    pool.put(a=A[:10], b=B[:3])
    stores, left = pool.index.begin_stores(["a", "b"], pages=2)
    assert [(store.user, store.first_token, len(store.gpu_pages)) for store in stores] == [("a", 6, 2)]
    assert left == ["b"]


def test_pages_evicted_before_they_were_saved_are_counted():
    pool = Pool(gpu=4)
    pool.put(a=A[:6])
    pool.store("a")
    pool.put(a=A[:10])
    counts = []
    for user in "bcde":
        pool.put(**{user: chain_of([ord(user)])})
        counts.append((pool.tokens()["a"], pool.index.stats().unsaved_pages))
    # A page was free at first; of the second page the host has tokens 4 and 5 alone, the first it has whole.
    assert counts == [((10, 6), 0), ((8, 6), 1), ((4, 6), 2), ((0, 6), 2)]


def test_a_half_filled_page_that_the_host_has_is_no_loss():
    pool = Pool(gpu=4)
    pool.put(a=A[:10])
    pool.store("a")
    pool.put(b=B[:16])
    assert pool.tokens() == {"a": (0, 10), "b": (16, 0)}
    assert pool.index.stats().unsaved_pages == 0
    pool.put(c=chain_of(range(16)))
    assert pool.index.stats().unsaved_pages == 4


def test_pages_of_users_who_share_an_eviction_add_up():
    pool = Pool(gpu=6)
    pool.put(a=A[:8])
    pool.put(b=B[:8])
    pool.store("b")
    pool.put(c=chain_of(range(24)))
    assert pool.tokens() == {"b": (0, 8), "c": (24, 0)}
    assert pool.index.stats().unsaved_pages == 2


def test_pages_evicted_from_the_host_are_not_counted():
    pool = Pool(host=2)
    pool.put(a=A[:8])
    pool.store("a")
    pool.put(a=A[:12], b=B[:4])
    pool.store("b")
    assert pool.tokens() == {"a": (12, 4), "b": (4, 4)}
    assert pool.index.stats().unsaved_pages == 0


def test_what_is_void_or_never_committed_is_no_loss():
    pool = Pool(gpu=4)
    pool.put(a=A[:8])
    pool.put(success=False, b=B[:8])
    pool.put(a=chain_of([0, 99]))  # a correction
    pool.index.invalidate("a")
    stats = pool.index.stats()
    assert (stats.gpu.free, stats.unsaved_pages, stats.gpu.evicted_pages) == (4, 0, 0)
    pool.put(a=A[:6], b=B[:6])
    pool.store("a")  # with 6 tokens
    pool.put(c=chain_of([5]))
    pool.index.invalidate_all()
    assert pool.index.stats().unsaved_pages == 0


def test_the_host_tier_grows_under_what_is_in_flight():
    pool = Pool(host=2)
    pool.put(a=A[:12])
    store = pool.index.begin_store("a")
    assert store is not None
    assert store.tokens == 8
    pool.index.grow_host(2)
    pool.index.check()
    host = pool.index.stats().host
    assert (host.total, host.free, host.used, host.in_flight) == (4, 2, 0, 2)
    pool.index.end_store(store.ticket, True)
    rest = pool.index.begin_store("a")
    assert rest is not None
    assert (rest.first_token, rest.tokens) == (8, 12)
    pages = {*store.host_pages.tolist(), *rest.host_pages.tolist()}
    assert len(pages) == 3
    assert pages < set(range(4))
    pool.index.end_store(rest.ticket, True)
    assert pool.tokens() == {"a": (12, 12)}
    assert host.evicted_pages == pool.index.stats().host.evicted_pages == 0


def test_a_host_tier_can_start_from_nothing():
    pool = Pool(host=0, track_freed=True)
    pool.put(a=A[:8])
    assert pool.index.begin_store("a") is None
    pool.index.grow_host(0)
    assert pool.index.begin_store("a") is None
    pool.index.grow_host(1)
    pool.index.grow_host(1)
    pool.store("a")
    assert pool.tokens() == {"a": (8, 8)}
    pool.index.invalidate("a")
    assert sorted(pool.index.drain_freed("host").tolist()) == [0, 1]


@pytest.mark.parametrize("pages", [-1, 2**31 - 1, 2**40])
def test_a_host_tier_does_not_grow_out_of_bounds(pages: int):
    pool = Pool(host=2)
    before = pool.index.stats()
    with pytest.raises(InvalidArgument) as raised:
        pool.index.grow_host(pages)
    assert raised.value.field == "pages"
    assert pool.index.stats() == before
    pool.index.check()


def test_an_id_that_is_none_begins_no_store_of_the_users_ahead_of_it() -> None:
    pool = Pool()
    pool.put(a=A[:8])
    with pytest.raises(InvalidArgument):
        pool.index.begin_stores(["a", ""])
    assert pool.index.stats().stores_in_flight == 0
    pool.index.check()
