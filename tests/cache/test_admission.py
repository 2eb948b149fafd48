"""Whom a full host tier lets in: wtinylfu compares how often the newcomer and whom it would push out were used."""

from __future__ import annotations

import pytest
from tiered_index_pool import P, Pool, chain_of

from mtserve._core import policy_names


def history(user: str, pages: int):
    return chain_of([(ord(user) << 20) + token for token in range(pages * P)])


def used_often(policy: str, host: int = 4) -> Pool:
    """A host tier full of two users with three batches each."""
    pool = Pool(gpu=40, host=host, policy=policy)
    for user in "ab":
        pool.put(**{user: history(user, 2)})
        pool.store(user)
        for _ in range(2):
            pool.put(**{user: history(user, 2)})
    return pool


def on_host(pool: Pool) -> dict[str, int]:
    return {user: host // P for user, (_, host) in sorted(pool.tokens().items()) if host}


@pytest.mark.parametrize("policy", sorted(policy_names()))
def test_a_newcomer_used_less_often_is_let_in_later(policy: str):
    pool, asked = used_often(policy), 0
    for batch in range(1, 6):
        pool.put(c=history("c", 2))
        for _ in range(3):  # asked once a batch
            if store := pool.index.begin_store("c"):
                pool.index.end_store(store.ticket, True)
        pool.index.check()
        asked = pool.index.stats().declined_stores
        if asked < batch:
            break
        assert on_host(pool) == {"a": 2, "b": 2}
    assert (asked > 0) is (policy == "wtinylfu")
    assert on_host(pool)["c"] == 2


def test_nobody_is_asked_about_who_takes_free_pages_or_is_in():
    pool = used_often("wtinylfu", host=6)
    pool.put(c=history("c", 2))
    pool.store("c")
    pool.put(c=history("c", 3))
    pool.store("c")  # takes a page of another
    assert on_host(pool)["c"] == 3
    assert pool.index.stats().declined_stores == 0


def test_who_is_declined_has_what_is_free_and_no_hole():
    pool = used_often("wtinylfu", host=5)
    pool.put(c=history("c", 3))
    store = pool.index.begin_store("c")
    assert store is not None
    assert (store.first_token, store.tokens, len(store.host_pages)) == (0, P, 1)
    pool.index.end_store(store.ticket, True)
    assert pool.index.stats().declined_stores == 1
    assert pool.index.begin_store("c") is None  # not before its next batch
    pool.index.invalidate("b")
    store = pool.index.begin_store("c")  # free now
    assert store is not None
    assert (store.first_token, store.tokens) == (P, 3 * P)
    pool.index.end_store(store.ticket, True)
    assert on_host(pool) == {"a": 2, "c": 3}
    pool.index.check()
