"""The locality policy once more, plainly. Numbers are those of C++, operation by operation, so that victims are the same."""

from __future__ import annotations

import math
from collections.abc import Collection

from policy_models import MASK, Model, first

AGES = 44
SIZES, RATES = 8, 8
KINDS = SIZES * RATES


def place_of(idle: float) -> float:
    """Where in the ages so many seconds are: 1, 1.5, 2, 3, 4, 6 ... begin one."""
    if idle < 1:
        return max(0.0, idle)
    part, exponent = math.frexp(idle)
    return 2 * exponent - 3 + 4 * part


def age_of(idle: float) -> int:
    return int(min(AGES - 1, place_of(idle)))


def begin(age: int) -> float:
    return 0 if age == 0 else math.ldexp(1.0 if age % 2 else 1.5, (age - 1) // 2)


def seconds(age: int) -> float:
    return begin(age + 1) - begin(age) if age + 1 < AGES else begin(age)


def densities(returns: list[float]) -> list[float]:
    """log of the hits a second, [AGES]: the largest over all ends of a stay that starts at the age."""
    out, later = [0.0] * AGES, list[tuple[float, float, float]]()
    for age in reversed(range(AGES)):
        share = returns[age]
        hits, time, left = share, seconds(age) * (1 - share / 2), 1 - share
        while later and later[-1][0] / later[-1][1] > hits / time:
            more, longer, stay = later.pop()
            hits, time, left = hits + left * more, time + left * longer, left * stay
        out[age] = math.log(max(1e-12, hits / time))
        later.append((hits, time, left))
    return out


class Watch:
    def __init__(self) -> None:
        self.users: list[list[float]] = []  # key, last request, kind, age
        self.places: dict[int, int] = {}
        self.ended = [[0] * AGES for _ in range(KINDS)]
        self.passed = [[0] * AGES for _ in range(KINDS)]
        self.mask = self.at = self.gaps = 0

    def watches(self, key: int) -> bool:
        return (key * 0x9E3779B97F4A7C15 & MASK) >> 32 & self.mask == 0

    def catch_up(self, user: list[float], now: float) -> None:
        while user[3] + 1 < AGES and now - user[1] >= begin(int(user[3]) + 1):
            self.passed[int(user[2])][int(user[3])] += 1
            user[3] += 1

    def request(self, key: int, kind: int, now: float) -> None:
        self.at = (self.at + 1) if self.at + 1 < len(self.users) else 0
        if self.users:
            self.catch_up(self.users[self.at], now)
        if not self.watches(key):
            return
        if key not in self.places:
            self.places[key] = len(self.users)
            self.users.append([key, now, kind, 0])
            if len(self.users) > 1 << 14:
                self.thin()
            return
        user = self.users[self.places[key]]
        self.catch_up(user, now)
        self.ended[int(user[2])][int(user[3])] += 1
        user[1:] = [now, kind, 0]
        self.gaps += 1
        if self.gaps > 64 * len(self.users):
            for counts in (*self.ended, *self.passed):
                counts[:] = [count // 2 for count in counts]
            self.gaps = 0

    def thin(self) -> None:
        self.users = [user for user in self.users if user[3] + 1 < AGES]
        if len(self.users) > (1 << 14) * 3 // 4:
            self.mask = 2 * self.mask + 1
            self.users = [user for user in self.users if self.watches(int(user[0]))]
        self.places = {int(user[0]): place for place, user in enumerate(self.users)}

    @staticmethod
    def shares(ended: list[int], passed: list[int], others: list[float]) -> list[float]:
        out, likelier = list[float](), 1.0
        for end, on, other in zip(ended, passed, others, strict=True):
            theirs = other / (1 - other)
            odds = theirs * likelier
            out.append((end + 128 * (odds / (1 + odds))) / (end + on + 128))
            likelier = min(max(out[-1] / (1 - out[-1]) / theirs, 1 / 64), 64.0)
        return out

    def returns(self) -> list[list[float]]:
        """By kind, the share that returns during each age of those who reach it."""
        ended, passed = ([sum(counts) for counts in zip(*kinds, strict=True)] for kinds in (self.ended, self.passed))
        pooled = self.shares(ended, passed, [0.25] * AGES)
        return [self.shares(self.ended[kind], self.passed[kind], pooled) for kind in range(KINDS)]


class Habits:
    UNIT = 4 * 3600.0

    def __init__(self) -> None:
        self.buckets: list[list[tuple[int, int, int]]] = [[] for _ in range(256)]  # tag, time, frequency

    def bucket(self, key: int) -> tuple[list[tuple[int, int, int]], int]:
        mixed = key * 0x9E3779B97F4A7C15 & MASK
        mixed ^= mixed >> 32
        return self.buckets[mixed % len(self.buckets)], mixed >> 52

    def fit(self, held: int) -> None:
        while 16 * len(self.buckets) < 12 * held:
            self.buckets += [list(bucket) for bucket in self.buckets]

    @staticmethod
    def rounded(frequency: int) -> int:
        """The middle of the 16th of its power of two that it is in."""
        step = 2 ** (frequency.bit_length() - 5)
        return frequency // step * step + step // 2

    def take(self, key: int, now: float) -> tuple[int, float]:
        bucket, tag = self.bucket(key)
        for place in bucket:
            if place[0] == tag:
                bucket.remove(place)
                units = (math.floor(now / self.UNIT) - place[1]) % 4096
                return place[2], 0.0 if units >= 2048 else units * self.UNIT
        return 0, 0.0

    def put(self, key: int, frequency: int, last: float) -> None:
        bucket, tag = self.bucket(key)
        bucket.insert(0, (tag, math.floor(last / self.UNIT), self.rounded(frequency)))
        del bucket[16:]


class Locality(Model):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queues: list[list[int]] = [[] for _ in range(KINDS)]
        self.watch, self.habits = Watch(), Habits()
        self.asked: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.turn: dict[int, int] = {}
        self.frequency: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self.costs = [1.0] * KINDS
        self.turns = self.requests = self.learn_at = 0
        self.scored_at = 0.0
        self.learn()

    def learn(self) -> None:
        self.learn_at += min(max(self.learn_at, 64), 16384)
        self.density = [
            [each + math.log(cost) for each in densities(returns)]
            for returns, cost in zip(self.watch.returns(), self.costs, strict=True)
        ]

    def request(self, slot: int) -> None:
        self.watch.request(self.keys[slot], self.kind_of(slot), self.now)
        self.requests += 1
        if self.requests == self.learn_at:
            self.learn()

    @staticmethod
    def level(pages: int) -> int:
        return sum(pages >= 8 * 2**step for step in range(SIZES - 1))

    def kind_of(self, slot: int) -> int:
        return self.size[slot] * RATES + sum(self.frequency[slot] / 64 > 4 * 2**step for step in range(RATES - 1))

    def queue_of(self, slot: int) -> list[int]:
        return next(queue for queue in self.queues if slot in queue)

    @staticmethod
    def one_more(frequency: int, idle: float) -> int:
        left = frequency / (1 + max(0.0, idle) / (7 * 86400.0))
        return int(min(65535.0, left + 64 + 0.5))

    def inserted(self, slot: int) -> None:
        frequency, idle = self.habits.take(self.keys[slot], self.now)
        self.size[slot] = self.level(self.pages[slot])
        self.frequency[slot] = self.one_more(frequency, idle)
        self.turns += 1
        self.asked[slot], self.last[slot], self.turn[slot] = self.now, self.now, self.turns
        kind = self.kind_of(slot)
        self.costs[kind] += (self.cost - self.costs[kind]) / 64
        self.queues[kind].append(slot)
        self.habits.fit(sum(map(len, self.queues)))
        self.request(slot)

    def accessed(self, slot: int) -> None:
        self.frequency[slot] = self.one_more(self.frequency[slot], self.now - self.asked[slot])
        self.asked[slot] = self.now
        self.request(slot)
        self.refreshed(slot)

    def refreshed(self, slot: int) -> None:
        self.turns += 1
        self.last[slot], self.turn[slot] = self.now, self.turns
        self.queue_of(slot).remove(slot)
        self.queues[self.kind_of(slot)].append(slot)

    def resized(self, slot: int) -> None:
        self.size[slot] = max(self.size[slot], self.level(self.pages[slot]))

    def removed(self, slot: int, evicted: bool) -> None:
        if evicted:
            self.habits.put(self.keys[slot], self.frequency[slot], self.asked[slot])
        self.queue_of(slot).remove(slot)

    def rank(self, slot: int, kind: int) -> tuple[float, int]:
        place = place_of(self.scored_at - self.last[slot])
        if place < 1:
            return math.inf, self.turn[slot]
        middle = min(max(place - 0.5, 0.0), AGES - 1.0)
        age = min(int(middle), AGES - 2)
        here, after = self.density[kind][age : age + 2]
        return here + (middle - age) * (after - here), self.turn[slot]

    def choose(self, pinned: Collection[int]) -> int | None:
        if abs(self.now - self.scored_at) >= 1:
            self.scored_at = self.now
        ranked = [
            (self.rank(slot, kind), slot)
            for kind, queue in enumerate(self.queues)
            if (slot := first(queue, pinned)) is not None
        ]
        return min(ranked)[1] if ranked else None
