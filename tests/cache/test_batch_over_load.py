"""A batch begun over a load in flight: what it counts on, what it publishes, and what becomes of it without the bytes."""

from __future__ import annotations

import pytest
from tiered_index_pool import A, B, Pool, chain_of

from mtserve.cache.index import Load
from mtserve.errors import FailedPrecondition


def loading(tokens: int = 12) -> tuple[Pool, Load]:
    """Eight GPU pages, three of which a load fills with user a's tokens; the host has 12 of these, the GPU none yet."""
    pool = Pool(gpu=8)
    pool.put(a=A[:12])
    pool.store("a")
    pool.put(b=B[:30])
    pool.index.invalidate("b")
    load = pool.index.begin_load("a", A[:tokens])
    assert load is not None
    assert load.tokens == tokens
    return pool, load


def end_load(pool: Pool, load: Load, success: bool = True) -> None:
    pool.index.end_load(load.ticket, success)
    pool.index.check()


def end_batch(pool: Pool, ticket: int, success: bool = True) -> list[str]:
    spoiled = pool.index.end_batch(ticket, success)
    pool.index.check()
    return spoiled


def test_what_the_load_brings_counts_as_cached():
    pool, load = loading()
    ticket, cached, stored, table = pool.begin(a=A[:15])
    assert (cached, stored) == ([12], [15])
    assert table[0][:3] == load.gpu_pages.tolist()
    (present,) = pool.index.survey(["a"], [A])
    assert (present.gpu_tokens, present.arriving_tokens, present.loading, present.in_batch) == (0, 12, True, True)
    assert pool.tokens() == {"a": (0, 12)}
    end_load(pool, load)
    assert pool.tokens() == {"a": (12, 12)}
    assert end_batch(pool, ticket) == []
    assert pool.tokens() == {"a": (15, 12)}


def test_a_batch_encodes_what_the_load_found_no_room_for():
    pool = Pool(gpu=4)
    pool.put(a=A[:12])
    pool.store("a")
    blocker = pool.begin(c=B[:12])[0]
    pool.put(d=chain_of([7]))  # takes a's last page
    load = pool.index.begin_load("a", A)
    assert load is not None
    assert load.tokens == 4
    end_batch(pool, blocker, False)
    ticket, cached, stored, _ = pool.begin(a=A[:14])
    assert (cached, stored) == ([4], [14])
    end_load(pool, load)
    assert end_batch(pool, ticket) == []
    assert pool.tokens() == {"a": (14, 12)}


def test_an_earlier_moment_of_the_history_shortens_no_load():
    pool, load = loading()
    ticket, cached, stored, _ = pool.begin(a=A[:5])
    assert (cached, stored) == ([5], [5])
    end_load(pool, load)
    assert end_batch(pool, ticket) == []
    assert pool.tokens() == {"a": (12, 12)}


def test_success_before_the_load_ended_is_refused_and_changes_nothing():
    pool, load = loading()
    ticket = pool.begin(c=B[:6], a=A[:15])[0]
    before = pool.index.stats(), pool.index.users(), pool.index.is_busy("a"), pool.index.is_busy("c")
    with pytest.raises(FailedPrecondition, match="still open") as raised:
        pool.index.end_batch(ticket, True)
    assert raised.value.field == "ticket"
    assert (pool.index.stats(), pool.index.users(), pool.index.is_busy("a"), pool.index.is_busy("c")) == before
    pool.index.check()
    end_load(pool, load)
    assert end_batch(pool, ticket) == []
    assert pool.tokens() == {"a": (15, 12), "c": (6, 0)}


def test_a_failed_load_spoils_its_own_user_only():
    pool, load = loading()
    ticket = pool.begin(c=B[:6], a=A[:15])[0]
    end_load(pool, load, False)
    assert pool.tokens() == {"a": (0, 12), "c": (0, 0)}
    assert pool.index.stats().gpu.in_flight == 6  # the batch still holds them
    assert end_batch(pool, ticket) == ["a"]
    assert pool.tokens() == {"a": (0, 12), "c": (6, 0)}
    assert pool.index.stats().gpu.in_flight == 0
    ticket, cached, _, _ = pool.begin(a=A[:15])
    assert cached == [0]
    assert end_batch(pool, ticket) == []
    assert pool.tokens()["a"] == (15, 12)


def test_a_failed_batch_tells_of_a_failed_load_too():
    pool, load = loading()
    ticket = pool.begin(a=A[:15])[0]
    end_load(pool, load, False)
    assert end_batch(pool, ticket, False) == ["a"]
    assert pool.tokens() == {"a": (0, 12)}


def test_a_batch_that_fails_before_the_load_ended_leaves_it_its_pages():
    pool, load = loading()
    ticket = pool.begin(a=A[:20])[0]
    assert end_batch(pool, ticket, False) == []
    assert pool.index.stats().gpu.in_flight == 5  # two of them the batch's: they go back when the last ticket ends
    end_load(pool, load)
    assert pool.tokens() == {"a": (12, 12)}
    assert pool.index.stats().gpu.in_flight == 0


@pytest.mark.parametrize("success", [True, False])
def test_the_load_s_end_matters_to_the_batch_then_open(success: bool):
    pool, load = loading()
    assert end_batch(pool, pool.begin(a=A[:13])[0], False) == []
    ticket, cached, _, _ = pool.begin(a=A[:15])
    assert cached == [12]
    end_load(pool, load, success)
    assert end_batch(pool, ticket) == ([] if success else ["a"])
    assert pool.tokens() == {"a": (15 if success else 0, 12)}


@pytest.mark.parametrize("true_tokens", [6, 0])
def test_a_correction_lowers_what_the_load_brings(true_tokens: int):
    pool, load = loading()
    fixed = chain_of([*range(true_tokens), 77, 78, 79])
    ticket, cached, stored, table = pool.begin(a=fixed)
    assert (cached, stored) == ([true_tokens], [true_tokens + 3])
    assert pool.tokens() == {"a": (0, true_tokens)}
    assert pool.index.survey(["a"], [fixed])[0].arriving_tokens == true_tokens
    pages = len([page for page in table[0] if page >= 0])
    assert table[0][:pages] == load.gpu_pages.tolist()[:pages]
    held = pool.index.stats()
    assert held.gpu.used + held.gpu.in_flight == held.host.used + held.host.in_flight == 3  # the load's, all of them
    end_load(pool, load)
    assert pool.tokens() == {"a": (true_tokens, true_tokens)}
    assert end_batch(pool, ticket) == []
    assert pool.tokens() == {"a": (true_tokens + 3, true_tokens)}
    stats = pool.index.stats()
    assert (stats.corrections, stats.gpu.in_flight, stats.host.in_flight) == (1, 0, 0)
    assert stats.host.used == -(-true_tokens // 4)


def test_a_correction_behind_the_load_leaves_it_alone():
    pool, load = loading(tokens=6)
    ticket, cached, stored, _ = pool.begin(a=chain_of([*range(9), 77, 78]))
    assert (cached, stored) == ([6], [11])
    end_load(pool, load)
    assert end_batch(pool, ticket) == []
    assert pool.tokens() == {"a": (11, 9)}


def test_a_corrected_load_that_fails_spoils_the_batch():
    pool, load = loading()
    ticket = pool.begin(a=chain_of([*range(6), 77]))[0]
    end_load(pool, load, False)
    assert end_batch(pool, ticket) == ["a"]
    assert pool.tokens() == {"a": (0, 6)}


def test_a_failed_store_spoils_no_batch():
    pool = Pool()
    pool.put(a=A[:8])
    store = pool.index.begin_store("a")
    assert store is not None
    ticket = pool.begin(a=A[:10])[0]
    pool.index.end_store(store.ticket, False)
    assert end_batch(pool, ticket) == []
    assert pool.tokens() == {"a": (10, 0)}


@pytest.mark.parametrize("success", [True, False])
def test_a_user_invalidated_under_both_gets_nothing(success: bool):
    pool, load = loading()
    ticket = pool.begin(a=A[:15])[0]
    assert pool.index.invalidate("a")
    pool.index.check()
    assert pool.index.survey(["a"], [A])[0].arriving_tokens == 0
    with pytest.raises(FailedPrecondition, match="still open"):
        pool.index.end_batch(ticket, True)
    second, cached, _, table = pool.begin(a=A[:8])
    assert cached == [0]
    assert not set(table[0][:2]) & set(load.gpu_pages.tolist())
    end_load(pool, load, success)
    assert end_batch(pool, ticket) == ([] if success else ["a"])
    assert pool.tokens() == {"a": (0, 0)}
    assert pool.index.stats().detached == 0
    assert end_batch(pool, second) == []
    assert pool.tokens() == {"a": (8, 0)}


def test_no_copy_begins_beside_the_two():
    pool, load = loading(tokens=8)
    ticket = pool.begin(a=A[:15])[0]
    assert pool.index.begin_load("a", A) is None
    assert pool.index.begin_stores(["a"]) == ([], [])
    end_load(pool, load)
    assert pool.index.begin_load("a", A) is None  # the batch is still open
    assert end_batch(pool, ticket) == []
    store = pool.index.begin_store("a")
    assert store is not None
    assert (store.first_token, store.tokens) == (12, 15)
