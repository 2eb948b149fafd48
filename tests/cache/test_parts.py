"""A request is one use of its user, however many batches encode its prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiered_index_pool import P, Pool, chain_of

from mtserve._core import policy_names
from mtserve.errors import InvalidArgument

# Pages encoded by each batch of the first user, and whether it goes on with the request of the one before.
WHOLE = [(3, False)]
PARTS = [(1, False), (2, True), (3, True)]
REQUESTS = [(1, False), (2, False), (3, False)]
DO_NOT_COUNT = ("lru", "locality")  # locality not so few


def history(user: str, pages: int):
    return chain_of([(ord(user) << 20) + token for token in range(pages * P)])


def save(pool: Pool, user: str) -> None:
    if store := pool.index.begin_store(user):
        pool.index.end_store(store.ticket, True)
    pool.index.check()


def what_stays(pool: Pool, batches: list[tuple[int, bool]]) -> list[dict[str, tuple[int, int]]]:
    """Tokens of every user after each request of others, who come once at first, then twice."""
    seen = []
    for pages, again in batches:
        pool.put(again=again, a=history("a", pages))
        save(pool, "a")
    for user in "bcdeffgghh":
        pool.put(**{user: history(user, 2)})
        save(pool, user)
        seen.append(pool.tokens())
    return seen


@pytest.mark.parametrize("policy", sorted(policy_names()))
@pytest.mark.parametrize("pages", [{"gpu": 8, "host": 40}, {"gpu": 40, "host": 8}], ids=["gpu", "host"])
def test_a_prefix_encoded_in_parts_is_one_use(policy: str, pages: dict[str, int]):
    whole, parts, requests = (what_stays(Pool(policy=policy, **pages), batches) for batches in (WHOLE, PARTS, REQUESTS))
    assert parts == whole
    assert (requests == whole) is (policy in DO_NOT_COUNT)


@pytest.mark.parametrize("policy", sorted(policy_names()))
def test_states_that_a_load_brought_are_used_once_by_a_request_in_parts(policy: str):
    def loaded() -> Pool:
        pool = Pool(gpu=8, host=40, policy=policy)
        pool.put(a=history("a", 1))
        save(pool, "a")
        pool.put(other=history("z", 8))  # pushes it off the GPU
        pool.index.invalidate("other")
        load = pool.index.begin_load("a", history("a", 3))
        assert load is not None
        pool.index.end_load(load.ticket, True)
        return pool

    whole, parts, requests = (what_stays(loaded(), batches) for batches in (WHOLE, PARTS, REQUESTS))
    assert parts == whole
    # s3fifo, which remembers who was evicted, takes a for frequent at once.
    assert (requests == whole) is (policy in (*DO_NOT_COUNT, "s3fifo"))


def test_each_user_of_a_batch_is_told_apart():
    pool = Pool(gpu=3, host=0, policy="gdsf")
    pool.put(a=history("a", 1), b=history("b", 1), c=history("c", 1))
    again, out = [True, False, True], (np.zeros(3, np.int32), np.zeros(3, np.int32), np.zeros((3, 1), np.int32))
    ticket = pool.index.begin_batch(list("abc"), [history(user, 1) for user in "abc"], *out, again)
    pool.index.end_batch(ticket, True)
    for user in "de":
        pool.put(**{user: history(user, 1)})
    assert sorted(pool.tokens()) == ["b", "d", "e"]


def test_a_part_makes_its_user_recent():
    pool = Pool(gpu=3, host=0)
    for user in "abc":
        pool.put(**{user: history(user, 1)})
    pool.put(again=True, a=history("a", 1))
    pool.put(d=history("d", 1))
    assert sorted(pool.tokens()) == ["a", "c", "d"]


def test_a_request_in_parts_is_declined_once():
    pool = Pool(gpu=40, host=4, policy="wtinylfu")
    for user in "ab":
        for _ in range(2):
            pool.put(**{user: history(user, 2)})
            save(pool, user)
    for pages, again in PARTS:
        pool.put(again=again, c=history("c", pages))
        save(pool, "c")
        assert pool.index.stats().declined_stores == 1
    assert "c" not in [user for user, (_, host) in pool.tokens().items() if host]
    for _ in range(2):  # the second makes it more uses than a and b have had
        pool.put(c=history("c", 3))
        save(pool, "c")
        assert pool.index.stats().declined_stores == 2
    assert pool.tokens()["c"] == (3 * P, 3 * P)


@pytest.mark.parametrize("again", [[True], [True, 1], [False, None], [True, False, True]])
def test_there_is_one_bool_a_user_or_none(again: Any):
    pool, out = Pool(), (np.zeros(2, np.int32), np.zeros(2, np.int32), np.zeros((2, 3), np.int32))
    with pytest.raises(InvalidArgument) as raised:
        pool.index.begin_batch(["a", "b"], [history("a", 1), history("b", 1)], *out, again)
    assert raised.value.field == "again"
    assert pool.index.stats().batches_in_flight == pool.index.stats().users == 0
