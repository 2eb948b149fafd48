from __future__ import annotations

import numpy as np
import pytest
from demands import demand, growing

from mtserve.model.presets import preset
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.simulate.demand import Demand, demand_of
from mtserve.trace.simulate.reuse import lru_hits, pages_between, previous_requests
from mtserve.trace.simulate.run import simulate

PAGE = 8


def _hits(of: Demand, pages: int) -> int:
    """Tokens found by LRU in a plain list of users, tails first."""
    order: list[int] = []
    held: dict[int, int] = {}
    found = 0
    for user, tokens in zip(of.user.tolist(), of.tokens.tolist(), strict=True):
        found += held.get(user, 0)
        if user in held:
            order.remove(user)
        order.append(user)
        held[user] = tokens
        over = sum(-(-each // PAGE) for each in held.values()) - pages
        for victim in list(order):
            if over <= 0:
                break
            has = -(-held[victim] // PAGE)
            taken = min(over, has)
            over -= taken
            held[victim] = min(held[victim], (has - taken) * PAGE)
    return found


def test_pages_between_counts_each_user_once_with_what_it_has_now() -> None:
    #        a  b  c  b  a  a  c
    user = np.array([0, 1, 2, 1, 0, 0, 2], dtype=np.int32)
    pages = np.array([4, 1, 2, 3, 5, 5, 9], dtype=np.int64)
    previous = previous_requests(user)
    assert previous.tolist() == [-1, -1, -1, 1, 0, 4, 2]
    assert pages_between(pages, previous).tolist() == [0, 0, 0, 2, 3 + 2, 0, 3 + 5]


@pytest.mark.parametrize("seed", range(8))
def test_every_size_at_once_equals_a_plain_lru_of_each_size(seed: int) -> None:
    of = growing(np.random.default_rng(seed), users=25, requests=300)
    hits = lru_hits(of, PAGE)
    assert (np.diff(hits) >= 0).all() and hits[0] == 0
    for pages in (1, 3, 10, 40, 120, 300, len(hits) - 1, len(hits) + 50):
        assert hits[min(pages, len(hits) - 1)] == _hits(of, pages)


def test_nobody_who_comes_back_finds_nothing() -> None:
    assert lru_hits(demand([0, 1, 2], [10, 20, 30]), PAGE).tolist() == [0]


@pytest.mark.parametrize("model", ["hstu-512", "mtgr-small"])
def test_the_engines_index_finds_the_same(model: str) -> None:
    """New generations, which the engine encodes in the background, shrink states: there alone the two may differ."""
    trace = generate(GeneratorConfig(users=300, requests=6000, candidates_mean=3.0, clicks_mean=2.0))
    of = demand_of(trace, preset(model), 3)
    hits, tokens = lru_hits(of, 64), int(of.tokens.sum(dtype=np.int64))
    for share in (0.01, 0.05, 0.2, 0.6, 1.2):
        pages = max(40, round(share * of.working_set_pages(64)))
        found = simulate(of, policy="lru", gpu_pages=pages, host_pages=0, page_tokens=64).hit_ratio["token"]["gpu"]
        assert hits[min(pages, len(hits) - 1)] / tokens == pytest.approx(found, abs=1e-3)
