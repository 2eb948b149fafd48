"""The locality policy with a clock: beside the plain model, what it learns, what it forgets, and clocks that fail."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from policy_model_locality import AGES, Locality, Watch, age_of, begin, densities, place_of, seconds

from mtserve._core import _Policy
from mtserve.errors import InvalidArgument


class Pair:
    """The policy and the model on one tier. Calls go to both, and answers must be the same."""

    def __init__(self, capacity: int) -> None:
        self.policy, self.model, self.capacity = _Policy("locality", capacity), Locality(capacity), capacity
        self.slots: dict[int, int] = {}
        self.free: list[int] = []
        self.victims: list[int] = []

    def tell(self, call: str, *arguments: Any) -> Any:
        answers = [getattr(each, call)(*arguments) for each in (self.policy, self.model)]
        assert answers[0] == answers[1], (call, arguments)
        return answers[0]

    def request(self, user: int, pages: int, now: float, pinned: tuple[int, ...] = (), cost: float = 1.0) -> None:
        if user in self.slots:
            self.tell("access", self.slots[user], now)
        held = self.model.pages[self.slots[user]] if user in self.slots else 0
        taken = [self.slots[each] for each in (user, *pinned) if each in self.slots]
        while (missing := self.policy.pages + pages - held - self.capacity) > 0:
            slot = self.tell("victim", taken, now)
            if slot is None:
                return
            self.shrink(slot, missing)
        if held == 0:
            self.slots[user] = self.free.pop() if self.free else len(self.slots)
            self.tell("insert", self.slots[user], user * 0x9E3779B97F4A7C15 % 2**64, pages, now, cost)
        elif pages > held:
            self.tell("resize", self.slots[user], pages)

    def shrink(self, slot: int, missing: int) -> None:
        if self.model.pages[slot] > missing:
            self.tell("resize", slot, self.model.pages[slot] - missing)
            return
        victim = next(user for user, its in self.slots.items() if its == slot)
        self.victims.append(victim)
        self.tell("remove", slot, True)
        self.free.append(self.slots.pop(victim))


def _live(pair: Pair, rng: random.Random, requests: int, clock: Any, now: float = 1e6) -> None:
    """Users with habits of their own: some ask often, some have long histories, some come once."""
    for number in range(requests):
        now = clock(now)
        user = min(int(rng.paretovariate(0.4)) - 1, 3000)
        pages = 1 + user % 7 + (user % 97 == 0) * 40 + number // 2000
        pinned = tuple(rng.sample(sorted(pair.slots), min(3, len(pair.slots)))) if number % 50 == 0 else ()
        pair.request(user, pages, now, pinned, 1.0 + user % 3)
        if number % 11 == 0 and pair.slots:
            pair.tell("refresh", pair.slots[rng.choice(sorted(pair.slots))], now)
        if number % 500 == 0:
            pair.policy.check()
    pair.policy.check()


CLOCKS = {
    "even": lambda rng: lambda now: now + 1,
    "uneven": lambda rng: lambda now: now + rng.lognormvariate(1, 2),
    "still": lambda rng: lambda now: now,
    "back and forth": lambda rng: lambda now: now + rng.choice((1, 1, 5, 30, 3600, -3600, -2, -1e6 / 2000, 2e5)),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_victims_are_those_of_the_model_by_any_clock(clock: str):
    rng = random.Random(7)
    pair = Pair(400)
    _live(pair, rng, 9000, CLOCKS[clock](rng))  # past several times that densities are learned
    assert len(pair.victims) > 500
    while (slot := pair.tell("victim", [], 3e6)) is not None:
        pair.tell("remove", slot, True)
    assert len(pair.policy) == pair.policy.pages == 0


def test_more_users_than_are_watched():
    """More than 2^14 users: half of them go unwatched, and victims stay those of the model."""
    pair = Pair(60)
    for number in range(36_000):
        pair.request(number % 19_000 if number % 3 else number % 40, 1, number * 2.0)
    assert len(pair.model.watch.users) < 2**14 < 19_000
    assert pair.model.watch.mask == 1
    pair.policy.check()


@pytest.mark.parametrize("now", [0.0, 1e9])
def test_where_the_clock_stands_still_it_is_lru(now: float):
    rng = random.Random(3)
    pages = [rng.choice((1, 3, 9, 30)) for _ in range(300)]
    policies = _Policy("locality", 500), _Policy("lru", 500)
    listed: set[int] = set()
    for _ in range(6000):
        user = min(int(rng.paretovariate(0.5)) - 1, 299)
        for policy in policies:
            if user in listed:
                policy.access(user, now)
        while user not in listed and policies[0].pages + pages[user] > 500:
            victims = [policy.victim((), now) for policy in policies]
            assert victims[0] == victims[1]
            for policy in policies:
                policy.remove(victims[0], True)
            listed.discard(victims[0])
        if user not in listed:
            for policy in policies:
                policy.insert(user, user, pages[user], now)
            listed.add(user)


def test_until_something_is_learned_it_is_lru():
    """Kinds differ, but nothing is known of them before the 64th request."""
    policy = _Policy("locality", 1000)
    for slot in range(60):
        policy.insert(slot, slot, 1 + slot % 20, slot * 60.0)
    victims = []
    while (victim := policy.victim((), 7000.0)) is not None:
        victims.append(victim)
        policy.remove(victim, True)
    assert victims == list(range(60))


def _learn(policy: Any) -> float:
    """Long users ask every hour, short ones once and never again. Returns the time."""
    now = 0.0
    for hour in range(60):
        for user in range(40):
            now = hour * 3600.0 + user
            if hour == 0:
                policy.insert(user, user, 64, now)
            else:
                policy.access(user, now)
        for each in range(100):
            slot = 1000 + hour * 100 + each
            policy.insert(slot, slot, 1, hour * 3600.0 + 60 + each)
    return now


def test_kinds_that_do_not_come_back_go_first():
    policy = _Policy("locality", 10**6)
    now = _learn(policy)
    policy.insert(50, 50, 64, now)  # of a kind that comes back after an hour
    policy.insert(60, 60, 1, now + 900)  # of one that never does
    victims = []
    for _ in range(6001):
        victim = policy.victim((), now + 2000)
        victims.append(victim)
        policy.remove(victim, True)
    assert 60 in victims
    assert min(victims) == 60  # of those that come back none went
    policy.check()


def test_what_costs_more_to_bring_back_stays_longer():
    policy = _Policy("locality", 10**6)
    for slot in range(5000):
        policy.insert(slot, slot, 64 if slot % 2 else 1, slot * 1.0, 50.0 if slot % 2 else 1.0)
    victims = []
    for _ in range(1000):
        victim = policy.victim((), 5000.0)
        victims.append(victim)
        policy.remove(victim, True)
    assert sum(victim % 2 for victim in victims) < 50
    with pytest.raises(InvalidArgument) as raised:
        policy.insert(5000, 5000, 1, 0.0, 0.0)
    assert raised.value.field == "cost"


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf])
def test_times_are_finite(now: float):
    policy = _Policy("locality", 10)
    policy.insert(0, 0, 1, 5.0)
    for call in (
        lambda: policy.insert(1, 1, 1, now),
        lambda: policy.access(0, now),
        lambda: policy.refresh(0, now),
        lambda: policy.victim((), now),
    ):
        with pytest.raises(InvalidArgument) as raised:
            call()
        assert raised.value.field == "now"


def test_habits_outlive_the_entry_only_where_it_was_evicted():
    """Two users of one size, both asked 41 times: the one whose states were void is new afterwards."""
    pair = Pair(100)
    for user, evicted in ((1, True), (2, False)):
        pair.tell("insert", user, user, 1, 0.0)
        for number in range(40):
            pair.tell("access", user, float(number))
        pair.tell("remove", user, evicted)
        pair.tell("insert", user, user, 1, 100.0)
    assert (pair.model.frequency[1] // 64, pair.model.frequency[2] // 64) == (42, 1)
    assert pair.model.kind_of(1) != pair.model.kind_of(2)


@pytest.mark.parametrize("start", [0.0, 1.7e9, -1.7e9])
def test_habits_are_known_by_any_epoch(start: float):
    """Clocks count from the machine's start or from 1970, which is more minutes ago than a place can hold."""
    pair = Pair(100)
    pair.tell("insert", 0, 7, 1, start)
    for number in range(40):
        pair.tell("access", 0, start + number)
    pair.tell("remove", 0, True)
    pair.tell("insert", 0, 7, 1, start + 100.0)
    assert round(pair.model.frequency[0] / 64) == 42
    others = Pair(400)
    _live(others, random.Random(7), 9000, lambda now: now + 1, start + 1e6)
    assert len(others.victims) > 500


def test_frequencies_are_remembered_to_a_32nd():
    pair = Pair(100)
    for requests in (1, 2, 3, 40, 1000, 3000):
        now = 3e6 * requests
        pair.tell("insert", 0, requests, 1, now)
        for _ in range(requests - 1):
            pair.tell("access", 0, now)
        before = pair.model.frequency[0]
        pair.tell("remove", 0, True)
        pair.tell("insert", 0, requests, 1, now)
        assert abs(pair.model.frequency[0] - 64 - before) <= before / 32 or before > 65535 - 64
        pair.tell("remove", 0, False)


@pytest.mark.parametrize(("days", "left"), [(-100, 40), (0, 40), (7, 20), (300, 1)])
def test_habits_fade_while_a_user_is_away(days: int, left: int):
    """A clock that went back fades nothing."""
    pair = Pair(100)
    pair.tell("insert", 0, 7, 1, 1e8)
    for _ in range(39):
        pair.tell("access", 0, 1e8)
    pair.tell("remove", 0, True)
    pair.tell("insert", 0, 7, 1, 1e8 + days * 86400.0)
    assert pair.model.frequency[0] / 64 == pytest.approx(left + 1, rel=0.04)


def test_who_comes_back_seldom_after_hours_is_taken_to_after_days():
    """Nothing ends or passes at the ages after the 20th; all classes together are as unknown there."""
    watch = Watch()
    for age in range(20):
        watch.ended[0][age], watch.passed[0][age] = 900, 100
        watch.ended[1][age], watch.passed[1][age] = 100, 900
    often, seldom, unknown = watch.returns()[:3]
    for age in range(20, AGES):
        assert seldom[age] < unknown[age] < often[age]


def test_habits_are_bounded():
    """However many users were evicted, the places are 24 for each that the tier held at most, or 4096."""
    pair = Pair(10)
    for user in range(6000):
        pair.request(user, 1, float(user))
    remembered = sum(map(len, pair.model.habits.buckets))
    assert remembered <= 4096 < len(pair.victims)
    assert all(len(bucket) <= 16 for bucket in pair.model.habits.buckets)
    pair.policy.check()


def test_the_same_calls_give_the_same_victims():
    lives = []
    for _ in range(2):
        rng, pair = random.Random(5), Pair(200)
        _live(pair, rng, 4500, CLOCKS["uneven"](rng))
        lives.append(pair.victims)
    assert lives[0] == lives[1]


def test_ages_cover_all_idle_times():
    assert [begin(age) for age in range(6)] == [0, 1, 1.5, 2, 3, 4]
    for age in range(AGES):
        assert age_of(begin(age)) == age
        assert place_of(begin(age) + seconds(age) / 2) == pytest.approx(
            min(age + 0.5, 43.5 if age < 43 else 44.0), abs=0.51
        )
    assert age_of(-5.0) == 0
    assert age_of(1e12) == AGES - 1


def test_densities_are_the_largest_quotient_over_all_ends():
    """Against the definition: returns and seconds summed from each age on, for every end."""
    rng = random.Random(1)
    for _ in range(50):
        returns = [rng.random() ** rng.choice((1, 4)) for _ in range(AGES)]
        for age, density in enumerate(densities(returns)):
            best, hits, time, left = 0.0, 0.0, 0.0, 1.0
            for end in range(age, AGES):
                hits += left * returns[end]
                time += left * seconds(end) * (1 - returns[end] / 2)
                left *= 1 - returns[end]
                best = max(best, hits / time)
            assert density == pytest.approx(math.log(best), abs=1e-9)


def test_a_gap_under_way_counts_as_far_as_it_went():
    watch = Watch()
    watch.request(1, 0, 0.0)
    watch.request(2, 5, 10_000.0)
    watch.request(2, 5, 10_003.0)
    assert sum(watch.passed[0]) == age_of(10_000.0)
    assert watch.ended[5][age_of(3.0)] == 1
