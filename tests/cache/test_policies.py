"""Replacement policies: victims computed by hand, and the C++ core beside the plain models on random lives."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from policy_model_locality import Locality
from policy_models import Arc, Gdsf, Lru, Model, S3Fifo, Sieve, WTinyLfu
from tiered_index_pool import Pool, chain_of

from mtserve._core import _Policy, digest, policy_names
from mtserve.cache.index import TieredIndex
from mtserve.config import EngineConfig
from mtserve.errors import FailedPrecondition, InvalidArgument

MODELS: dict[str, type[Model]] = {
    "lru": Lru, "sieve": Sieve, "s3fifo": S3Fifo, "arc": Arc, "gdsf": Gdsf, "wtinylfu": WTinyLfu, "locality": Locality,
}  # fmt: skip
NAMES = sorted(MODELS)


def _serve(name: str, capacity: int, requests: str) -> str:
    """Users of one page each, requested one after the other. Who was evicted, in that order."""
    policy, victims = _Policy(name, capacity), ""
    for user in requests.replace(" ", ""):
        slot = ord(user)
        if policy.contains(slot):
            policy.access(slot)
            continue
        if policy.pages == capacity:
            victim = policy.victim()
            victims += chr(victim)
            policy.remove(victim, evicted=True)
        policy.insert(slot, slot, 1)
        policy.check()
    return victims


@pytest.mark.parametrize(
    ("name", "requests", "victims"),
    [
        ("lru", "abc a d e b", "bca"),
        ("sieve", "abc a d e b", "bcd"),  # the hand stops behind b; a, passed once, outlives the newer d
        ("s3fifo", "abcd bb e a f ff g", "acdeb"),  # b, then a, a ghost, and f reach the main queue
        ("arc", "abc a d b e f a g", "bcadef"),  # b moves the target up, a's return down again: f goes, not b
        ("gdsf", "abc a d e f", "bca"),  # the clock reaches a's two uses: a tie with d, which was used later
        ("locality", "abc a d e b", "bca"),  # lru where time stands still
        ("wtinylfu", "abc a d e e f ff e g h", "bcdae"),  # c and d lose against a, f wins, e draws with f and loses
    ],
)
def test_victims_are_those_computed_by_hand(name: str, requests: str, victims: str):
    assert _serve(name, 3, requests) == victims


def test_gdsf_keeps_the_long_of_equally_frequent_users():
    policy = _Policy("gdsf", 200)
    policy.insert(0, 0, 64)
    policy.insert(1, 1, 1)
    policy.insert(2, 2, 128)
    assert policy.victim() == 1
    assert policy.victim([1]) == 0
    policy.access(1)
    assert policy.victim() == 0  # 1 + 64 / 64 against 2 * (1 + 1 / 64)


@pytest.mark.parametrize("name", NAMES)
def test_a_user_evicted_in_parts_leaves_a_ghost_of_its_whole_size(name: str):
    """Only s3fifo and arc have ghosts: there an old ghost is forgotten for a heavy one."""
    policy, model = _Policy(name, 20), MODELS[name](20)
    for each in (policy, model):
        each.insert(0, 0, 10)
        each.resize(0, 1)
        each.remove(0, True)
        for slot in range(1, 12):
            each.insert(slot, slot, 1)
            each.remove(slot, True)
        each.insert(20, 0, 5)
        each.insert(21, 11, 5)
        each.insert(22, 22, 10)
    policy.check()
    assert _drain(policy, []) == _drain(model, [])


def _drain(policy: Any, pinned: list[int]) -> list[int]:
    """Evicts whole users until only pinned ones are left."""
    victims = []
    while (victim := policy.victim(pinned)) is not None:
        victims.append(victim)
        policy.remove(victim, True)
    return victims


class Pair:
    """A policy and its model, told the same; slots are reused, keys return."""

    def __init__(self, name: str, capacity: int, rng: random.Random) -> None:
        self.policy, self.model, self.rng = _Policy(name, capacity), MODELS[name](capacity), rng
        self.capacity = capacity
        self.users: dict[int, int] = {}  # slot by user
        self.pinned: set[int] = set()  # users
        self.victims = 0

    def tell(self, call: str, *arguments: Any) -> Any:
        answers = [getattr(each, call)(*arguments) for each in (self.policy, self.model)]
        assert answers[0] == answers[1], (call, arguments)
        return answers[0]

    def request(self, user: int, pages: int) -> None:
        if user in self.users:
            self.tell("access", self.users[user])
        elif self.make_room(pages):
            slot = next(slot for slot in range(10_000) if slot not in self.users.values())
            self.users[user] = slot
            self.tell("insert", slot, user * 0x9E3779B97F4A7C15 % 2**64, pages)

    def make_room(self, pages: int) -> bool:
        """Takes as many pages as are missing, and no more: the last victim keeps the rest."""
        while (missing := self.policy.pages + pages - self.capacity) > 0:
            slot = self.tell("victim", [self.users[user] for user in self.pinned])
            if slot is None:
                return False
            self.victims += 1
            held = self.model.pages[slot]
            if held > missing:
                self.tell("resize", slot, held - missing)
            else:
                self.remove(next(user for user, its in self.users.items() if its == slot), True)
        return True

    def remove(self, user: int, evicted: bool) -> None:
        self.tell("remove", self.users.pop(user), evicted)

    def step(self, user: int) -> None:
        dice = self.rng.random()
        if user not in self.users or dice < 0.6:
            self.request(user, self.rng.choice((1, 1, 2, 3, 8)))
        elif dice < 0.68:
            self.tell("refresh", self.users[user])
        elif dice < 0.76:
            more = self.rng.randint(1, 3)
            self.pinned.add(user)
            if self.make_room(more):
                self.tell("resize", self.users[user], self.model.pages[self.users[user]] + more)
            self.pinned.discard(user)
        elif dice < 0.78:
            self.pinned.discard(user)
            self.remove(user, False)
        elif dice < 0.80:
            self.pinned = set(self.rng.sample(sorted(self.users), min(len(self.users), self.rng.choice((0, 1, 4, 9)))))
        elif dice < 0.802:
            self.capacity += 2
            self.tell("grow", 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seed", "capacity", "users"), [(1, 12, 20), (2, 40, 60), (3, 7, 7), (4, 150, 400)])
def test_victims_are_those_of_the_model(name: str, seed: int, capacity: int, users: int):
    rng = random.Random(seed)
    pair = Pair(name, capacity, rng)
    for _ in range(2000):
        pair.step(min(int(rng.paretovariate(0.6)) - 1, users))
        pair.policy.check()
        assert (len(pair.policy), pair.policy.pages) == (len(pair.model.pages), sum(pair.model.pages.values()))
    assert pair.victims > 100
    assert _drain(pair.policy, []) == _drain(pair.model, [])
    assert len(pair.policy) == pair.policy.pages == 0
    pair.policy.check()


@pytest.mark.parametrize("name", NAMES)
def test_pinned_users_keep_their_place(name: str):
    """Victims with some of them pinned are those without pins, less the pinned ones."""
    policies = [_Policy(name, 100), _Policy(name, 100)]
    for policy in policies:
        for slot in range(100):
            policy.insert(slot, slot, 1)
    pinned = list(range(0, 100, 7))
    expected = [slot for slot in _drain(policies[0], []) if slot not in pinned]
    assert _drain(policies[1], pinned) == expected
    assert policies[1].victim(pinned) is None
    assert _drain(policies[1], []) == pinned


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_is_the_same_calls_one_by_one(name: str):
    rng = np.random.default_rng(5)
    requests = np.minimum(rng.zipf(1.2, 3000) - 1, 299).astype(np.int32)
    pages = rng.integers(1, 6, 300, dtype=np.int32)
    policy, capacity, hits = _Policy(name, 120), 120, 0
    slots: dict[int, int] = {}
    free = list(range(300))[::-1]
    for place, user in enumerate(requests.tolist()):
        if user in slots:
            policy.access(slots[user])
            hits += 1
            continue
        recent = requests[max(0, place - 8) : place].tolist()
        while policy.pages + pages[user] > capacity:
            victim = policy.victim([slots[each] for each in recent if each in slots])
            policy.remove(victim, True)
            del slots[next(each for each, slot in slots.items() if slot == victim)]
            free.append(victim)
        slots[user] = free.pop()
        policy.insert(slots[user], digest(np.int32(user).tobytes()), int(pages[user]))
    replayed = _Policy(name, capacity)
    assert replayed.replay(requests, pages, recent=8) == hits
    assert 0 < hits < len(requests)
    assert _drain(replayed, []) == _drain(policy, [])
    with pytest.raises(FailedPrecondition, match="other calls"):
        replayed.replay(requests, pages)


def _lost(policy: str, steps: str) -> list[str]:
    """The users whose GPU pages go for a newcomer, after what happened to the first of three."""
    pool = Pool(gpu=4, host=20, policy=policy)
    for user in range(3):
        pool.put(**{f"u{user}": chain_of([user] * 4)})
        pool.store(f"u{user}")
    pool.put(other=chain_of([9] * 16))  # pushes all off the GPU
    pool.index.invalidate("other")
    for step in steps.split():
        if step == "load":
            load = pool.index.begin_load("u0", chain_of([0] * 4))
            pool.index.end_load(load.ticket, True)
        elif step == "wait":
            pool.index.set_window(["u0"])
            pool.index.set_window([])
        else:
            pool.put(u0=chain_of([0] * 4))
    for user in (1, 2):
        pool.put(**{f"u{user}": chain_of([user] * 4)})
    pool.put(new=chain_of([7] * 8))
    return [user for user, (gpu, _) in sorted(pool.tokens().items()) if gpu == 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_counts_once_whatever_brought_its_states(name: str):
    """A load and a turn that comes near before a user's batch are no uses of their own: policies would take the user for frequent."""
    once = _lost(name, "batch")
    assert _lost(name, "load") == _lost(name, "load wait wait") == _lost(name, "load wait batch") == once
    thrice = _lost(name, "batch batch batch")
    assert _lost(name, "load batch wait batch batch") == thrice
    # lru does not count, locality not so few; wtinylfu asks for no contest before the window has passed its share.
    assert (thrice == once) is (name in ("lru", "wtinylfu", "locality"))


@pytest.mark.parametrize("voided", [False, True])
def test_only_who_was_evicted_is_remembered(voided: bool):
    pool = Pool(gpu=4, host=0, policy="s3fifo")
    names = iter("bcdefghijk")

    def put(user: str) -> None:
        pool.put(**{user: chain_of([ord(user)] * 4)})

    put("a")
    if voided:
        pool.index.invalidate("a")
    else:
        while "a" in pool.tokens():
            put(next(names))
    put("a")
    for _ in range(5):
        put(next(names))
    assert ("a" in pool.tokens()) is not voided


def test_a_grown_host_tier_remembers_more_of_whom_it_evicted():
    pool = Pool(gpu=40, host=1, policy="s3fifo")
    pool.index.grow_host(7)
    for user in "abcdefghij":
        pool.put(**{user: chain_of([ord(user)] * 8)})
    for user in "abcde" + "a" + "fghij":
        pool.store(user)
    assert "a" in [user for user, (_, host) in pool.tokens().items() if host]


@pytest.mark.parametrize("name", NAMES)
def test_two_slots_may_share_a_key(name: str):
    """A hash may collide: nothing breaks, and of two ghosts the later one counts."""
    policy, model = _Policy(name, 10), MODELS[name](10)
    for each in (policy, model):
        for slot, pages in ((0, 2), (1, 5)):
            each.insert(slot, 7, pages)
        for slot in (0, 1):
            each.remove(slot, True)
        for slot in range(5):
            each.insert(slot, 7 + slot, 2)
    policy.check()
    assert _drain(policy, []) == _drain(model, [])


@pytest.mark.parametrize("name", NAMES)
def test_a_tier_that_grows_far_keeps_what_its_policy_knows(name: str):
    pair = Pair(name, 12, random.Random(11))
    for grown in (0, 100):
        pair.capacity += grown
        pair.tell("grow", grown)
        for _ in range(3000):
            pair.request(min(int(pair.rng.paretovariate(0.5)) - 1, 2000), 1)
    pair.policy.check()
    assert pair.victims > 1000
    assert _drain(pair.policy, []) == _drain(pair.model, [])


def test_every_name_is_a_choice_of_the_configuration():
    assert sorted(policy_names()) == NAMES
    for name in NAMES:
        assert EngineConfig(policy=name).policy == name
        TieredIndex(4, 2, 2, policy=name).check()
    with pytest.raises(InvalidArgument, match=f"not one of {', '.join(policy_names())}"):
        TieredIndex(4, 2, 2, policy="mru")


def test_malformed_calls_are_refused():
    policy = _Policy("lru", 10)
    policy.insert(3, 3, 1)
    numbers = np.zeros(4, np.int32)
    for call, field in [
        (lambda: _Policy("lru", -1), "capacity_pages"),
        (lambda: policy.insert(3, 3, 1), "slot"),
        (lambda: policy.insert(2**27, 3, 1), "slot"),
        (lambda: policy.insert(4, 3, 0), "pages"),
        (lambda: policy.resize(3, 0), "pages"),
        (lambda: policy.access(4), "slot"),
        (lambda: policy.refresh(4), "slot"),
        (lambda: policy.remove(2**31, True), "slot"),
        (lambda: policy.victim([-1]), "pinned"),
        (lambda: policy.grow(-1), "pages"),
        (lambda: policy.grow(2**31), "capacity_pages"),
        (lambda: policy.replay(numbers, numbers), "pages"),
        (lambda: policy.replay(numbers + 4, numbers + 1), "users"),
        (lambda: policy.replay(numbers, numbers + 1, 1025), "recent"),
        (lambda: policy.replay(numbers.astype(np.int64), numbers + 1), "users"),
    ]:
        with pytest.raises(InvalidArgument) as raised:
            call()
        assert raised.value.field == field
    policy.check()
    assert (len(policy), policy.pages) == (1, 1)
