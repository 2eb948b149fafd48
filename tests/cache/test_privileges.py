"""Users whose states are evicted last: those whose turn is near, and pinned ones as far as the budget goes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from privilege_model import Model
from tiered_index_pool import P, Pool, chain_of

from mtserve._core import policy_names
from mtserve.errors import CorruptState, InvalidArgument, ResourceExhausted

NAMES = sorted(policy_names())


def pages(user: str, count: int):
    """A history of so many full pages, which differs from every other user's."""
    return chain_of([(ord(user) << 20) + token for token in range(count * P)])


def filled(users: str, gpu: int, each: int = 2, **more) -> Pool:
    """A pool in which each user has a batch of so many pages, and where there is a host, a copy."""
    pool = Pool(gpu=gpu, **more)
    for user in users:
        pool.put(**{user: pages(user, each)})
        if more.get("host"):
            pool.store(user)
    return pool


def on_gpu(pool: Pool) -> dict[str, int]:
    return {user: gpu // P for user, (gpu, _) in sorted(pool.tokens().items()) if gpu}


def test_others_go_first_then_pins_then_the_window_from_its_end():
    pool = filled("abcde", gpu=10, host=0, pin_budget=0.5)
    pool.index.pin(["a", "b"])
    pool.index.set_window(["c", "d"])
    held = [on_gpu(pool)]
    for count in range(1, 11):
        pool.put(z=pages("z", count))
        held.append(on_gpu(pool))
    gone = [user for before, after in pairwise(held) for user in before if user not in after]
    assert gone == ["e", "a", "b", "d", "c"]
    assert held[2:5] == [
        {"a": 2, "b": 2, "c": 2, "d": 2, "z": 2},
        {"a": 1, "b": 2, "c": 2, "d": 2, "z": 3},
        {"b": 2, "c": 2, "d": 2, "z": 4},
    ]


@pytest.mark.parametrize("policy", NAMES)
def test_whose_turn_is_near_keeps_its_states_under_every_policy(policy: str):
    rng = random.Random(5)
    pool = filled("abcdefgh", gpu=16, host=24, policy=policy)
    window = list("beh")
    for step in range(200):
        pool.index.set_window(window if step % 3 else window[::-1])
        stranger = rng.choice("cdfgijklmn")
        if stranger in pool.tokens() and (load := pool.index.begin_load(stranger, pages(stranger, 3))):
            pool.index.end_load(load.ticket, True)
        pool.put(**{stranger: pages(stranger, rng.randint(1, 4))})
        if store := pool.index.begin_store(stranger):
            pool.index.end_store(store.ticket, True)
        pool.index.check()
        assert {user: pool.tokens()[user] for user in window} == dict.fromkeys(window, (2 * P, 2 * P))
    pool.index.set_window([])
    for _ in range(200):
        stranger = rng.choice("opqrstuvwx")
        pool.put(**{stranger: pages(stranger, 2)})
    assert not set(window) & set(on_gpu(pool))


def test_a_load_takes_from_later_turns_alone():
    pool = filled("abc", gpu=6, host=6)
    pool.put(a=pages("a", 2), b=pages("b", 2), c=pages("c", 2))
    pool.index.set_window(["c", "a", "b"])
    pool.index.invalidate("a")
    pool.put(a=pages("a", 2))
    pool.store("a")
    pool.put(z=pages("z", 2))  # takes b's, the last
    assert on_gpu(pool) == {"a": 2, "c": 2, "z": 2}
    pool.index.set_window(["c", "a", "b", "z"])
    load = pool.index.begin_load("b", pages("b", 2))
    assert load is not None
    assert on_gpu(pool) == {"a": 2, "c": 2}
    pool.index.end_load(load.ticket, False)
    pool.put(z=pages("z", 2))
    pool.index.set_window(["z", "a", "c", "b"])
    assert pool.index.begin_load("b", pages("b", 2)) is None  # all others come before it
    pool.index.set_window(["z", "a", "c"])
    assert pool.index.begin_load("b", pages("b", 2)) is None  # and it has no turn
    assert on_gpu(pool) == {"a": 2, "c": 2, "z": 2}
    pool.index.check()


def test_a_store_takes_nothing_from_the_privileged():
    pool = filled("abc", gpu=12, host=4, pin_budget=0.5)
    assert {user: host // P for user, (_, host) in pool.tokens().items()} == {"a": 0, "b": 2, "c": 2}
    pool.index.set_window(["b"])
    pool.index.pin(["c"])
    assert pool.index.begin_store("a") is None
    pool.index.unpin(["c"])
    pool.store("a")
    assert {user: host // P for user, (_, host) in pool.tokens().items()} == {"a": 2, "b": 2, "c": 0}


def test_the_budget_covers_those_used_last():
    pool = filled("abcd", gpu=20, host=0, pin_budget=0.3)

    def covered() -> tuple[int, int]:
        gpu = pool.index.stats().gpu
        return gpu.pinned_users, gpu.pinned_pages

    assert pool.index.pin(list("abcda")) == 4
    assert pool.index.pin(["a"]) == 0
    assert pool.index.stats().pinned == 4
    assert covered() == (3, 6)  # a, pinned again, d and c
    pool.put(b=pages("b", 3))
    assert covered() == (2, 5)  # b and a: d's two pages are too many
    pool.put(y=pages("y", 9), z=pages("z", 10))
    assert on_gpu(pool) == {"b": 1, "y": 9, "z": 10}  # c, d, then of the covered a, used before b
    assert covered() == (1, 1)


def test_a_user_larger_than_the_budget_is_like_anybody():
    pool = filled("ab", gpu=10, each=4, host=0, pin_budget=0.3)
    pool.index.pin(["b", "a"])
    assert pool.index.stats().gpu.pinned_users == 0
    pool.put(z=pages("z", 4))
    assert on_gpu(pool) == {"a": 2, "b": 4, "z": 4}
    assert pool.index.stats().gpu[-2:] == (1, 2)  # what is left of a
    pool.put(b=pages("b", 4))
    assert pool.index.stats().gpu[-2:] == (0, 0)  # the latest, b, does not fit, so a, used before it, is not covered
    pool.index.unpin(["b"])
    assert pool.index.stats().gpu[-2:] == (1, 2)


def test_a_pin_holds_for_states_to_come_and_outlives_them():
    pool = Pool(gpu=8, host=0, pin_budget=0.5)
    assert pool.index.pin(["a", "b"]) == 2
    pool.put(a=pages("a", 2), b=pages("b", 2))
    assert pool.index.stats().gpu.pinned_pages == 4
    pool.index.invalidate("a")
    pool.put(a=pages("a", 1))
    assert pool.index.stats().gpu.pinned_pages == 3
    pool.index.invalidate_all()
    assert pool.index.unpin(["a", "c"]) == 1
    pool.put(a=pages("a", 2), b=pages("b", 2))
    assert pool.index.stats().gpu.pinned_pages == 2
    assert pool.index.stats().pinned == 1


def test_the_host_s_budget_grows_with_it():
    pool = filled("ab", gpu=8, host=4, pin_budget=0.25)
    pool.index.pin(["a", "b"])
    assert pool.index.stats().host.pinned_pages == 0
    pool.index.grow_host(4)
    assert pool.index.stats().host.pinned_pages == 2
    pool.index.check()


def test_what_no_pin_can_be_is_refused_and_changes_nothing():
    pool = Pool()
    for call in (pool.index.pin, pool.index.unpin, pool.index.set_window):
        for users, field in ((["a", ""], "users[1]"), (["a", "x" * 257], "users[1]"), (["a", 3], "users")):
            with pytest.raises(InvalidArgument) as raised:
                call(users)
            assert raised.value.field == field
    pool.index.pin(["first"])
    with pytest.raises(ResourceExhausted, match="1048576"):
        pool.index.pin([f"u{number}" for number in range(2**20)])
    assert pool.index.stats().pinned == 1
    for budget in (-0.1, 0.51, float("nan")):
        with pytest.raises(InvalidArgument, match=r"outside 0 to 0\.5"):
            Pool(pin_budget=budget)
    pool.index.check()


class Spelled(Sequence[str]):
    """User ids that exist only while somebody looks at them."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, number):
        if number >= len(self):
            raise IndexError(number)
        return f"user {number} {'x' * 60}"


def test_users_may_come_in_any_sequence():
    pool = Pool()
    assert pool.index.pin(Spelled()) == 300
    assert pool.index.unpin(list(Spelled())) == 300
    pool.index.set_window(Spelled())
    pool.index.check()


@pytest.mark.parametrize("seed", range(6))
def test_the_index_is_what_a_plain_model_says(seed: int):
    rng = random.Random(seed)
    total, budget = rng.choice([(12, 0.5), (20, 0.3), (30, 0.1), (9, 0.0)])
    pool, model, users = Pool(gpu=total, host=0, pin_budget=budget), Model(total, int(total * budget)), "abcdefghij"
    size = dict.fromkeys(users, 0)
    for _ in range(1500):
        dice, some = rng.random(), rng.sample(users, rng.randint(0, 4))
        if dice < 0.7:
            user = rng.choice(users)
            size[user] = min(8, size[user] + rng.choice([0, 0, 1, 2]))
            pool.put(**{user: pages(user, size[user])})
            model.batch(user, size[user])
        elif dice < 0.8:
            assert pool.index.pin(some[:2]) == model.pin(some[:2])
        elif dice < 0.86:
            assert pool.index.unpin(some) == model.unpin(some)
        elif dice < 0.96:
            pool.index.set_window(some)
            model.set_window(some)
        else:
            user = rng.choice(users)
            pool.index.invalidate(user)
            model.invalidate(user)
            size[user] = 0
        pool.index.check()
        assert on_gpu(pool) == model.pages
        stats = pool.index.stats()
        assert (stats.pinned, stats.gpu.pinned_users) == (len(model.pinned), len(model.covered))
        assert stats.gpu.pinned_pages == sum(model.pages[user] for user in model.covered)
    assert pool.index.stats().gpu.evicted_pages > 100


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("lost shield", "held with"),
        ("forgotten right", "not tied"),
        ("forgotten pin", "pages of a pinned user"),
        ("pinned pages", "pages of a pinned user"),
        ("pin counter", "counters"),
        ("window end", "beyond"),
        ("broken turns", "out of order"),
    ],
)
def test_check_finds_broken_privileges(what: str, named: str):
    pool = filled("ab", gpu=20, host=0)
    pool.index.pin(["a"])
    pool.index.set_window(["a", "b"])
    pool.index.check()
    pool.index._sabotage(what)
    with pytest.raises(CorruptState, match=named):
        pool.index.check()
