"""What a trace finds under each policy, and the two that know what comes: golden counts, plain models, brute force."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mtserve._core import _optimum, _Policy, _replay_trace, _TraceOracle, oracle_policy_names, policy_names
from mtserve.errors import InvalidArgument

Ints = npt.NDArray[np.int32]
Trace = tuple[Ints, npt.NDArray[np.float64], Ints]
PAGE = 16


def sessions(seed: int, users: int, requests: int) -> Trace:
    """(users, seconds, tokens) of users who come in sessions, each with its own pauses, and whose histories grow."""
    rng = random.Random(seed)
    events = []
    for user in range(users):
        now, mean = rng.random() * 86_400, 3600 * 2 ** rng.uniform(0, 5)
        tokens = rng.randint(1, 400)
        for _ in range(rng.choice((2, 8, 40)) * requests // (10 * users) + 1):
            events.append((now, user, tokens))
            tokens += rng.randint(0, 9)
            now += rng.expovariate(1 / mean) if rng.random() < 0.15 else rng.uniform(5, 300)
    events.sort()
    now, user, tokens = zip(*events, strict=True)
    return np.array(user, np.int32), np.array(now), np.array(tokens, np.int32)


def found(name: str, trace: Trace, capacity: int, page: int = PAGE) -> Ints:
    """Tokens that each request finds; `optimum` is a name, too."""
    user, seconds, tokens = trace
    out = np.empty(len(user), np.int32)
    known = int(user.max()) + 1
    if name == "optimum":
        _optimum(capacity, user, seconds, tokens, out, known, page)
    else:
        _replay_trace(name, capacity, user, seconds, tokens, out, known, page)
    return out


GOLDEN = {
    "lru": 4828232, "sieve": 4804652, "s3fifo": 4761800, "arc": 4793394, "gdsf": 4408557, "wtinylfu": 4318165,
    "locality": 4850386, "gap-oracle": 4853575, "belady": 5043121, "optimum": 5045392,
}  # fmt: skip


@pytest.mark.parametrize("name", [*policy_names(), *oracle_policy_names(), "optimum"])
def test_golden_counts_of_a_small_trace(name: str):
    trace = sessions(1, 150, 6000)
    assert int(found(name, trace, 400).sum()) == GOLDEN[name]


def test_who_knows_more_finds_more():
    for seed in range(3):
        trace = sessions(seed, 150, 6000)
        counts = {name: int(found(name, trace, 400).sum()) for name in (*policy_names(), "belady", "optimum")}
        assert counts.pop("optimum") >= counts["belady"]
        assert counts.pop("belady") > max(counts.values())


class Plain:
    """One tier, plainly: pages by user, and a rank by which users lose their last pages, the least first."""

    def __init__(self, capacity: int, rank: Any) -> None:
        self.capacity, self.rank = capacity, rank
        self.pages: dict[int, int] = {}
        self.tokens: dict[int, int] = {}

    def serve(self, user: int, tokens: int) -> int:
        before = min(self.tokens.get(user, 0), tokens)
        wanted = max(-(-tokens // PAGE), self.pages.get(user, 0))
        others = [other for other in self.pages if other != user]
        while (missing := wanted + sum(self.pages[other] for other in others) - self.capacity) > 0 and others:
            victim = min(others, key=self.rank)
            self.pages[victim] -= min(missing, self.pages[victim])
            self.tokens[victim] = min(self.tokens[victim], self.pages[victim] * PAGE)
            if self.pages[victim] == 0:
                del self.pages[victim]
                others.remove(victim)
        self.pages[user] = min(wanted, self.capacity)
        self.tokens[user] = min(tokens, self.pages[user] * PAGE)
        return before


@pytest.mark.parametrize("name", ["lru", "belady"])
@pytest.mark.parametrize("capacity", [20, 300, 900])
def test_a_replay_is_that_of_a_plain_tier(name: str, capacity: int):
    trace = sessions(4, 60, 1500)
    user, seconds, tokens = (column.tolist() for column in trace)
    times = {each: [t for u, t in zip(user, seconds, strict=True) if u == each] for each in set(user)}
    last: dict[int, float] = {}

    def rank(each: int) -> tuple[float, float]:
        following = next((t for t in times[each] if t > last[each]), math.inf)
        return (last[each], 0) if name == "lru" else (-following, last[each])

    tier = Plain(capacity, rank)
    expected = []
    for each, t, wanted in zip(user, seconds, tokens, strict=True):
        last[each] = t
        expected.append(tier.serve(each, wanted))
    assert found(name, trace, capacity).tolist() == expected


def _most_hits(users: list[int], pages: list[int], capacity: int) -> int:
    """Most pages found by any choice of prefixes to keep after each request, by trying them all."""
    best = {tuple([0] * (max(users) + 1)): 0}
    for user, wanted in zip(users, pages, strict=True):
        after: dict[tuple[int, ...], int] = {}
        for held, hits in best.items():
            hits += min(held[user], wanted)
            whole = [*held]
            whole[user] = wanted
            for kept in _prefixes(whole):
                if sum(kept) <= capacity:
                    after[kept] = max(after.get(kept, 0), hits)
        best = after
    return max(best.values())


def _prefixes(pages: list[int]) -> list[tuple[int, ...]]:
    if not pages:
        return [()]
    return [(kept, *rest) for kept in range(pages[0] + 1) for rest in _prefixes(pages[1:])]


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_that_of_trying_everything(seed: int):
    rng = random.Random(seed)
    users = [rng.randrange(3) for _ in range(9)]
    sizes = [rng.randint(1, 2) for _ in range(3)]
    pages = []
    for user in users:
        sizes[user] = min(3, sizes[user] + (rng.random() < 0.2))
        pages.append(sizes[user])
    trace = np.array(users, np.int32), np.arange(9.0), np.array(pages, np.int32)
    for capacity in (0, 1, 2, 4):
        assert int(found("optimum", trace, capacity, page=1).sum()) == _most_hits(users, pages, capacity)


def test_gap_oracle_keeps_who_comes_back_sooner():
    """One user comes every 10 min, one every 10 h: of two that asked at once the second goes."""
    often, seldom = np.arange(0, 90_000, 600.0), np.arange(0, 3_600_000, 36_000.0)
    t = np.concatenate([often, seldom])
    keys = np.repeat(np.array([1, 2], np.uint64), [len(often), len(seldom)])
    order = np.argsort(t, kind="stable")
    policy = _Policy("gap-oracle", 10, _TraceOracle(keys[order], t[order]))
    policy.insert(1, 1, 1, 36_000.0)
    policy.insert(2, 2, 1, 36_000.0)
    assert policy.victim((), 36_030.0) == 1  # both asked just now: the one inserted first
    assert policy.victim((), 36_400.0) == 2
    assert policy.victim([2], 36_400.0) == 1
    policy.refresh(2, 36_400.0)
    policy.check()


def test_gap_oracle_leaves_out_the_gap_that_it_is_asked_about():
    """User 2 stays away once. While that lasts it is taken for one who never does, as user 1: of the two the first goes."""
    regular = np.arange(0, 400_000, 200.0)
    odd = np.concatenate([np.arange(0, 20_000, 200.0), np.arange(300_000, 380_000, 200.0)])
    t = np.concatenate([regular, odd])
    keys = np.repeat(np.array([1, 2], np.uint64), [len(regular), len(odd)])
    order = np.argsort(t, kind="stable")
    policy = _Policy("gap-oracle", 10, _TraceOracle(keys[order], t[order]))
    policy.insert(2, 2, 1, 19_800.0)
    policy.insert(1, 1, 1, 19_800.0)
    assert policy.victim((), 20_500.0) == 2
    policy.access(1, 100_000.0)
    policy.access(2, 310_000.0)  # now it is known to stay away now and then, and to come back
    policy.access(1, 310_000.0)
    assert policy.victim((), 310_700.0) == 1


def test_a_policy_that_needs_an_oracle_says_so():
    for name in oracle_policy_names():
        with pytest.raises(InvalidArgument, match="needs an oracle"):
            _Policy(name, 10)
        policy = _Policy(name, 10, _TraceOracle(np.zeros(0, np.uint64), np.zeros(0)))
        policy.insert(0, 7, 1, 1.0)  # whom the oracle does not know
        policy.access(0, 500.0)
        assert policy.victim((), 1e9) == 0
        policy.remove(0, True)
        policy.check()
        assert policy.victim() is None
    assert not set(oracle_policy_names()) & set(policy_names())


def test_malformed_traces_are_refused():
    user, seconds, tokens = np.zeros(3, np.int32), np.arange(3.0), np.ones(3, np.int32)
    out = np.zeros(3, np.int32)
    good: dict[str, Any] = {
        "name": "lru", "capacity_pages": 4, "users": user, "t_s": seconds, "tokens": tokens, "found": out, "known": 1,
        "page_tokens": 16,
    }  # fmt: skip
    _replay_trace(**good)
    assert out.tolist() == [0, 1, 1]
    for field, value in [
        ("capacity_pages", -1),
        ("capacity_pages", 2**31),
        ("users", user + 1),
        ("users", user.astype(np.int64)),
        ("t_s", seconds[::-1].copy()),
        ("t_s", seconds * np.nan),
        ("t_s", seconds[:2]),
        ("tokens", tokens * -1),
        ("tokens", tokens * 2**25),
        ("tokens", tokens[:2]),
        ("found", out.astype(np.int64)),
        ("known", 0),
        ("known", 2**28),
        ("page_tokens", 0),
        ("page_tokens", 2000),
    ]:
        with pytest.raises(InvalidArgument) as raised:
            _replay_trace(**{**good, field: value})
        assert raised.value.field == field
    for keys, t_s, field in [(user, seconds, "keys"), (user.astype(np.uint64), seconds[::-1].copy(), "t_s")]:
        with pytest.raises(InvalidArgument) as raised:
            _TraceOracle(keys, t_s)
        assert raised.value.field == field
