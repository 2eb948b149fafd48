"""The simulation by itself: counts worked out by hand, a plain model of the tiers, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from demands import demand
from hypothesis import given
from hypothesis import strategies as st
from tier_model import TierModel

from mtserve._core import _replay_trace, _Simulation, _TraceOracle, oracle_policy_names, policy_names
from mtserve.errors import InvalidArgument
from mtserve.trace.csr import earlier_in_group
from mtserve.trace.hits import asked_before
from mtserve.trace.replay.features import splitmix64
from mtserve.trace.simulate.demand import Demand
from mtserve.trace.simulate.optimum import optimum
from mtserve.trace.simulate.run import BatchLimits, SimulatedRun, simulate


def make_demand(users: int, rows: list[tuple[int, int, int, int, int]]) -> Demand:
    """`rows`: user, tokens, generation, tokens after and generation after of each request."""
    table = np.array(rows, dtype=np.int32).reshape(-1, 5)
    user, tokens, generation, tokens_after, generation_after = table.T
    t_s, nothing = np.arange(len(table), dtype=np.float64), np.zeros(len(table), dtype=np.int32)
    return Demand(
        users, user, t_s, nothing, tokens, generation, nothing, tokens_after, generation_after, nothing
    )  # fmt: skip


def steady(*requests: tuple[int, int]) -> Demand:
    """Requests of (user, tokens), after which nothing is appended."""
    return make_demand(9, [(user, tokens, 0, tokens, 0) for user, tokens in requests])


def found(run: SimulatedRun) -> list[tuple[int, int]]:
    return list(zip(run.gpu_tokens.tolist(), run.host_tokens.tolist(), strict=True))


def lru(demand: Demand, gpu_pages: int, host_pages: int) -> SimulatedRun:
    return simulate(demand, policy="lru", gpu_pages=gpu_pages, host_pages=host_pages, page_tokens=4)


def test_a_user_is_found_where_it_was_left() -> None:
    # Two users of two pages fit the GPU, three the host.
    run = lru(steady((0, 8), (0, 8), (1, 8), (2, 8), (0, 8), (2, 8), (1, 8)), 4, 6)
    assert found(run) == [(0, 0), (8, 0), (0, 0), (0, 0), (0, 8), (8, 0), (0, 8)]
    assert run.hit_ratio == {
        "request": {"gpu": 2 / 7, "host": 2 / 7, "total": 4 / 7},
        "token": {"gpu": 2 / 7, "host": 2 / 7, "total": 4 / 7},
    }
    counters = run.counters
    assert (counters.loads, counters.loaded_pages, counters.stores, counters.stored_pages) == (2, 4, 3, 6)
    assert counters.gpu == (4, 4, 2, 6, 3, 0, 0)
    assert counters.host == (6, 6, 3, 0, 0, 0, 0)
    assert counters.unsaved_pages == 0


def test_a_tail_is_evicted_and_comes_back() -> None:
    # The third user takes one page of the first: tokens 4 to 6 of it come from the host.
    run = lru(steady((0, 6), (1, 8), (2, 3), (0, 7)), 4, 9)
    assert found(run) == [(0, 0), (0, 0), (0, 0), (4, 2)]
    assert run.tier.tolist() == [0, 0, 0, 1]
    # 2 pages of the first user, 2 and 1 of the others; then the first one's last page again, for its new token.
    assert run.counters.stored_pages == 2 + 2 + 1 + 1
    assert run.counters.loaded_pages == 1


def test_without_a_host_tier_what_is_evicted_is_gone() -> None:
    run = lru(steady((0, 8), (1, 8), (0, 8)), 3, 0)
    assert found(run) == [(0, 0), (0, 0), (4, 0)]
    assert run.counters.unsaved_pages == 1 + 1
    assert run.counters.host == (0, 0, 0, 0, 0, 0, 0)
    assert run.counters.stores == 0


def test_of_a_user_larger_than_the_tier_its_beginning_is_kept() -> None:
    run = lru(steady((0, 20), (0, 21), (1, 4), (0, 20)), 3, 4)
    assert found(run) == [(0, 0), (12, 0), (0, 0), (8, 4)]
    assert run.counters.gpu.used_pages == 3
    assert run.counters.host.used_pages == 4


def test_a_new_generation_is_encoded_in_the_background_where_the_old_one_is_held() -> None:
    rows = [(0, 8, 0, 5, 1), (0, 5, 1, 5, 1), (1, 12, 0, 4, 3), (0, 5, 1, 5, 1), (1, 4, 3, 4, 3)]
    run = lru(make_demand(2, rows), 3, 0)
    assert found(run) == [(0, 0), (5, 0), (0, 0), (0, 0), (4, 0)]
    assert run.counters.rebuilt == 2
    # Nothing of the user is held when its generation ends: nobody encodes the next one.
    run = lru(make_demand(1, [(0, 8, 0, 5, 1), (0, 5, 1, 5, 1)]), 0, 0)
    assert found(run) == [(0, 0), (0, 0)]
    assert run.counters.rebuilt == 0


def test_states_of_another_generation_are_void() -> None:
    run = lru(make_demand(1, [(0, 8, 0, 8, 0), (0, 8, 7, 8, 7), (0, 9, 7, 9, 7)]), 8, 8)
    assert found(run) == [(0, 0), (0, 0), (8, 0)]
    assert run.counters.gpu.evicted_pages == run.counters.gpu.evicted_users == 0


def mixed_demand(requests: int = 4000, users: int = 300) -> Demand:
    """Without a random generator, whose numbers may change: popular users ask often, and all histories grow."""
    mixed = splitmix64(np.arange(requests)).astype(np.float64) / 2.0**64
    user = (users * mixed**2.5).astype(np.int32)
    base = (splitmix64(np.arange(users) + requests) % np.uint64(90)).astype(np.int32)
    asked = np.zeros(users, dtype=np.int32)
    rows = []
    for each in user.tolist():
        before, after = (divmod(int(asked[each]) + more, 16) for more in (0, 1))
        rows.append((each, base[each] + 3 * before[1], before[0], base[each] + 3 * after[1], after[0]))
        asked[each] += 1
    demand = make_demand(users, rows)
    return replace(demand, t_s=600 * demand.t_s)


# By policy: tokens found on the GPU and on the host, loads, pages stored, generations encoded in the background.
GOLDEN = {
    "lru": (55386, 34224, 604, 38130, 110),
    "sieve": (64586, 32777, 544, 36573, 110),
    "s3fifo": (69761, 31690, 583, 35723, 110),
    "arc": (66768, 29849, 549, 36610, 110),
    "gdsf": (64062, 35222, 631, 35763, 110),
    "wtinylfu": (75295, 32804, 588, 8999, 110),
    "locality": (65742, 32554, 572, 36046, 110),
    "gap-oracle": (80570, 36614, 675, 31377, 110),
    "belady": (112275, 35523, 707, 23947, 110),
}


@pytest.mark.parametrize("policy", GOLDEN)
def test_golden_counts(policy: str) -> None:
    run = simulate(mixed_demand(), policy=policy, gpu_pages=400, host_pages=900, page_tokens=4)
    counters = run.counters
    counts = (int(run.gpu_tokens.sum()), int(run.host_tokens.sum()), counters.loads, counters.stored_pages)
    assert (*counts, counters.rebuilt) == GOLDEN[policy]


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    """Histories that grow, shrink, stay, or begin anew; a generation may come back."""
    histories: dict[int, tuple[int, int]] = {}
    rows = []
    for _ in range(draw(st.integers(1, 80))):
        user = draw(st.integers(0, 5))
        tokens, generation = histories.get(user) or (draw(st.integers(0, 30)), 0)
        after = max(0, tokens + draw(st.integers(-2, 9))), generation
        if draw(st.integers(0, 9)) == 0:
            after = draw(st.integers(0, 20)), draw(st.integers(0, 3))
        rows.append((user, tokens, generation, *after))
        histories[user] = after
    return make_demand(6, rows)


@given(demand=demands(), page_tokens=st.integers(1, 6), gpu_pages=st.integers(0, 25), host_pages=st.integers(0, 40))
def test_lru_is_what_a_plain_model_says(demand: Demand, page_tokens: int, gpu_pages: int, host_pages: int) -> None:
    model = TierModel(page_tokens, gpu_pages, host_pages)
    columns = (demand.user, demand.tokens, demand.generation, demand.tokens_after, demand.generation_after)
    expected = []
    for user, tokens, generation, *after in np.array(columns).T.tolist():
        expected.append(model.request(str(user), tokens, generation, (after[0], after[1])))
    run = simulate(demand, policy="lru", gpu_pages=gpu_pages, host_pages=host_pages, page_tokens=page_tokens)
    assert found(run) == expected
    for tier, counters in ((model.gpu, run.counters.gpu), (model.host, run.counters.host)):
        assert counters.used_pages == tier.pages - tier.free()
        assert counters.users == len(tier.order)
        assert counters.evicted_pages == tier.evicted_pages


@given(demand=demands(), policy=st.sampled_from(policy_names()), block=st.integers(1, 20))
def test_every_structure_holds_after_every_block_and_blocks_change_nothing(
    demand: Demand, policy: str, block: int
) -> None:
    core = _Simulation(3, 9, 14, policy, *BatchLimits(), 0.1, demand.users, None, None)
    gpu, host = (np.empty(demand.requests, dtype=np.int32) for _ in range(2))
    for first in range(0, demand.requests, block):
        part = slice(first, first + block)
        core.run(demand.t_s[part], demand.counts(part), gpu[part], host[part], None)
        core.check()
    whole = simulate(demand, policy=policy, gpu_pages=9, host_pages=14, page_tokens=3)
    assert found(whole) == list(zip(gpu.tolist(), host.tolist(), strict=True))


def test_progress_is_told_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.trace.simulate.run.BLOCK", 1500)
    told: list[tuple[int, int]] = []
    demand = mixed_demand()
    run = simulate(
        demand, policy="lru", gpu_pages=400, host_pages=900, page_tokens=4,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(1500, 4000), (3000, 4000), (4000, 4000)]
    assert int(run.gpu_tokens.sum()) == GOLDEN["lru"][0]


def test_hit_ratios_of_some_requests() -> None:
    demand = steady((0, 8), (0, 8), (1, 8), (0, 8))
    run = lru(demand, 2, 8)
    assert run.hit_ratio_among(asked_before(demand.user))["request"] == {"gpu": 0.5, "host": 0.5, "total": 1.0}
    assert run.hit_ratio_among(demand.user == 5)["token"] == {"gpu": 0.0, "host": 0.0, "total": 0.0}


def test_keys_decide_where_a_policy_hashes_them() -> None:
    demand = mixed_demand()
    keyed = replace(demand, keys=splitmix64(np.arange(demand.users) + 77))
    runs = [simulate(each, policy="wtinylfu", gpu_pages=60, host_pages=0, page_tokens=4) for each in (demand, keyed)]
    assert found(runs[0]) != found(runs[1])


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_times_that_go_back_change_nothing(value: float) -> None:
    core, demand = small_core(), steady((0, 8), (1, 8))
    t_s, out = np.array([0.0, value]), np.zeros((2, 2), dtype=np.int32)
    with pytest.raises(InvalidArgument) as caught:
        core.run(t_s, demand.counts(slice(None)), *out, None)
    assert caught.value.field == "t_s[1]"
    assert core.stats()[2] == core.stats()[0][1] == 0


@pytest.mark.parametrize(
    ("column", "value", "field"),
    [
        (0, 6, "users[1]"), (0, -1, "users[1]"), (1, -1, "candidates[1]"), (2, -1, "tokens[1]"), (4, -1, "frozen[1]"),
        (2, 2**24 + 1, "tokens[1]"), (5, -1, "tokens_after[1]"), (7, -1, "frozen_after[1]"),
    ],
)  # fmt: skip
def test_a_block_with_a_broken_request_changes_nothing(column: int, value: int, field: str) -> None:
    core, demand = small_core(), steady((0, 8), (1, 8))
    columns, out = [each.copy() for each in demand.counts(slice(None))], np.zeros((2, 2), dtype=np.int32)
    columns[column][1] = value
    with pytest.raises(InvalidArgument) as caught:
        core.run(demand.t_s, columns, *out, None)
    assert caught.value.field == field
    assert core.stats()[2] == core.stats()[0][1] == 0


def small_core() -> _Simulation:
    return _Simulation(4, 8, 8, "lru", *BatchLimits(), 0.1, 6, None, None)


def test_what_an_index_or_a_tier_refuses() -> None:
    demand = steady((0, 8))
    sizes: dict[str, Any] = {"policy": "lru", "gpu_pages": 1, "host_pages": 1, "page_tokens": 4}
    for field, value in (("policy", "best"), ("page_tokens", 0), ("gpu_pages", -1), ("host_pages", 2**31)):
        with pytest.raises(InvalidArgument) as caught:
            simulate(demand, **{**sizes, field: value})
        assert caught.value.field in (field, "pages")
    with pytest.raises(InvalidArgument, match="cold_after"):
        simulate(demand, **sizes, limits=BatchLimits(cold_after=0))
    with pytest.raises(InvalidArgument, match="users"):
        _Simulation(4, 1, 1, "lru", *BatchLimits(), 0.1, -1, None, None)
    with pytest.raises(InvalidArgument, match="keys"):
        _Simulation(4, 1, 1, "lru", *BatchLimits(), 0.1, 3, np.zeros(2, dtype=np.uint64), None)


def test_columns_of_other_types_or_lengths_are_refused() -> None:
    core, demand = small_core(), steady((0, 8))
    columns, out = demand.counts(slice(None)), np.zeros((2, 1), dtype=np.int32)
    for place, column in enumerate(columns):
        for wrong in (column.astype(np.int64), np.zeros(2, dtype=np.int32)):
            with pytest.raises(InvalidArgument, match="int32 array"):
                core.run(demand.t_s, [*columns[:place], wrong, *columns[place + 1 :]], *out, None)
    with pytest.raises(InvalidArgument, match="float64"):
        core.run(demand.t_s.astype(np.float32), columns, *out, None)
    with pytest.raises(InvalidArgument, match="8 columns"):
        core.run(demand.t_s, columns[:-1], *out, None)


@pytest.mark.parametrize("policy", [*policy_names(), *oracle_policy_names()])
def test_one_tier_of_growing_histories_is_what_a_replay_of_the_policy_finds(policy: str) -> None:
    demand = growing_demand()
    run = simulate(demand, policy=policy, gpu_pages=300, host_pages=0, page_tokens=4)
    found = np.empty(demand.requests, dtype=np.int32)
    _replay_trace(policy, 300, demand.user, demand.t_s, demand.tokens, found, demand.users, 4)
    np.testing.assert_array_equal(run.gpu_tokens, found)


def growing_demand() -> Demand:
    """One generation each; a request wants what the one before left."""
    mixed = mixed_demand()
    tokens = 10 + mixed.user % 37 + 2 * earlier_in_group(mixed.user, np.ones_like(mixed.user)).astype(np.int32)
    nothing = np.zeros_like(tokens)
    return replace(mixed, tokens=tokens, generation=nothing, tokens_after=tokens, generation_after=nothing)


def test_a_prefix_may_be_empty() -> None:
    """Of a newcomer without history, on a model without U features."""
    empty = demand([0, 1, 0, 1], [0, 10, 4, 12])
    for policy in (*policy_names(), *oracle_policy_names()):
        run = simulate(empty, policy=policy, gpu_pages=10, host_pages=0, page_tokens=4)
        assert run.gpu_tokens.tolist() == [0, 0, 0, 10]
    assert optimum(empty, 10, 4).tolist() == [0, 0, 0, 10]


def test_knowing_what_comes_finds_more() -> None:
    demand = growing_demand()
    hits = {
        policy: simulate(demand, policy=policy, gpu_pages=300, host_pages=0, page_tokens=4).hit_ratio["token"]["total"]
        for policy in ("lru", "belady")
    }
    assert hits["belady"] > 1.3 * hits["lru"]


def test_what_will_be_void_is_of_no_use_to_an_oracle() -> None:
    # The first user asks next, but for another generation: under belady it is the one to go.
    rows = [(0, 8, 0, 8, 0), (1, 8, 0, 8, 0), (2, 8, 0, 8, 0), (0, 8, 1, 8, 1), (1, 8, 0, 8, 0)]
    demand = make_demand(3, rows)
    assert demand.next_s().tolist() == [np.inf, 4, np.inf, np.inf, np.inf]
    run = simulate(demand, policy="belady", gpu_pages=4, host_pages=0, page_tokens=4)
    assert found(run) == [(0, 0), (0, 0), (0, 0), (0, 0), (8, 0)]


def test_an_oracle_needs_numbers_and_what_comes() -> None:
    demand = steady((0, 8), (1, 8))
    habits = _TraceOracle(demand.user.astype(np.uint64), demand.t_s)
    with pytest.raises(InvalidArgument, match="numbers"):
        _Simulation(4, 8, 8, "belady", *BatchLimits(), 0.1, 9, np.zeros(9, dtype=np.uint64), habits)
    with pytest.raises(InvalidArgument, match="oracle"):
        _Simulation(4, 8, 8, "belady", *BatchLimits(), 0.1, 9, None, None)
    core, out = _Simulation(4, 8, 8, "belady", *BatchLimits(), 0.1, 9, None, habits), np.zeros((2, 2), dtype=np.int32)
    for next_s in (None, np.array([0.5, 0.5]), np.array([np.nan, 2.0])):
        with pytest.raises(InvalidArgument) as caught:
            core.run(demand.t_s, demand.counts(slice(None)), *out, next_s)
        assert (caught.value.field or "").startswith("next_s")
