"""Which way a batch restores: held against the two queues run event by event, and against what must hold of any."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from restore_samples import (
    random_costs,
    random_layout,
    random_needs,
    random_others,
    simulate,
    visible_keys,
)

from mtserve.errors import InvalidArgument
from mtserve.restore.choice import NOTHING, Layout, Need, Work, choose, user_work
from mtserve.restore.costs import Costs, costs_for_cpu

SEEDS = range(60)
# A link of 1 GB/s whatever the piece, a token and layer of 1 KB in 1 us there, and a row in row_s on the device.
BASE = Costs(link=((1, 1e9),), load_s=0.0, batch_s=0.0, layer_s=0.0, row_s=1e-6, pair_s=0.0, unpack_s=0.0)
EIGHT = Layout(layers=8, page_tokens=10, layer_bytes=10_000, splits=None)


def linear(row_s: float, rate: float = 1e9, **changes: float) -> Costs:
    """Costs whose link brings pieces of every size at `rate`."""
    return dataclasses.replace(BASE, link=((1, rate), (2, rate)), row_s=row_s, **changes)


@pytest.mark.parametrize("seed", SEEDS)
def test_predictions_are_those_of_the_two_queues(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, layout, needs, others = random_costs(rng), random_layout(rng), random_needs(rng), random_others(rng)
    busy_s = float(rng.choice([0.0, 10 ** rng.uniform(-5, -2)]))
    ends = [simulate(costs, layout, needs, others, busy_s, layer) for layer in range(layout.layers + 1)]
    choice = choose(costs, layout, needs, others, link_busy_s=busy_s)
    assert math.isclose(choice.predicted_s, min(ends), rel_tol=1e-9)
    assert math.isclose(ends[choice.first_layer], choice.predicted_s, rel_tol=1e-9)
    expected = {"recompute": ends[-1], "load": ends[0]}
    if layout.layers > 1:
        expected["split"] = min(ends[1:-1])
    assert choice.by_way == pytest.approx(expected, rel=1e-9)
    assert choice.predicted_s == choice.by_way[choice.way] <= choice.by_way["recompute"]
    for way in expected:
        forced = choose(costs, layout, needs, others, link_busy_s=busy_s, way=way)
        assert math.isclose(ends[forced.first_layer], forced.predicted_s, rel_tol=1e-9)
        assert (forced.way, forced.predicted_s) == (way, choice.by_way[way])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slower_or_busier_link_never_brings_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, layout, needs, others = random_costs(rng), random_layout(rng), random_needs(rng), random_others(rng)
    slower = [
        dataclasses.replace(costs, link=tuple((size, rate / by) for size, rate in costs.link))
        for by in (0.01, 0.1, 0.5, 1, 1.5, 2, 4, 10, 100, 1e6)
    ]
    firsts = [choose(each, layout, needs, others).first_layer for each in slower]
    assert firsts == sorted(firsts)
    assert firsts[-1] == layout.layers
    busier = [choose(costs, layout, needs, others, link_busy_s=busy_s) for busy_s in (0, 1e-4, 1e-3, 1e-2, 0.1, 1e3)]
    assert [each.first_layer for each in busier] == sorted(each.first_layer for each in busier)
    assert busier[-1].way == "recompute"


def test_link_and_device_end_together() -> None:
    """100 absent tokens: 100 us a layer on the link, as many on the device."""
    choice = choose(linear(1e-6), EIGHT, [Need(100, 0, 100, 0)], NOTHING)
    assert choice.by_way == pytest.approx({"recompute": 8e-4, "load": 8e-4, "split": 4e-4})
    assert (choice.first_layer, choice.way) == (4, "split")
    # A device three times as fast encodes three layers while the link brings one.
    choice = choose(linear(1e-6 / 3), EIGHT, [Need(100, 0, 100, 0)], NOTHING)
    assert (choice.first_layer, choice.predicted_s) == (6, pytest.approx(2e-4))


def test_equals_go_to_recompute_then_to_what_loads_less() -> None:
    one = Layout(layers=1, page_tokens=10, layer_bytes=10_000)
    choice = choose(linear(2.0**-20, 1e3 * 2.0**20), one, [Need(100, 0, 100, 0)], NOTHING)
    assert choice.by_way["load"] == choice.by_way["recompute"]
    assert choice.way == "recompute"
    # Where nothing takes the device any time, what counts is the link alone: behind it, nothing is sooner.
    assert choose(linear(0.0), EIGHT, [Need(100, 0, 100, 0)], NOTHING).way == "recompute"
    # Where the device hides all loads, every split takes the same.
    hidden = linear(0.0, 1e18, layer_s=1e-3)
    assert choose(hidden, EIGHT, [Need(100, 0, 100, 0)], NOTHING, way="split").first_layer == 7


def test_whole_pages_are_brought() -> None:
    """Of pages of 10 tokens: 7 cached tokens fill no page, which comes again, and the host's last is brought whole."""
    costs = linear(1.0)
    for cached, host, pages in ((0, 1, 1), (7, 8, 1), (7, 25, 3), (10, 25, 2), (20, 30, 1), (19, 30, 2)):
        need = Need(40, cached, host, 0)
        assert EIGHT.pages(need) == pages
        loaded_s = choose(costs, EIGHT, [need], NOTHING, way="load").predicted_s
        rows_s = 8 * (40 - host)
        assert loaded_s == pytest.approx(rows_s + pages * 1e-5, abs=1e-9), (cached, host)  # the first layer's arrival


def test_groups_come_as_one() -> None:
    costs, need = linear(1e-7), Need(100, 0, 100, 0)
    whole = dataclasses.replace(EIGHT, groups=(0,))
    assert choose(costs, EIGHT, [need], Work(1000, 0), way="load").predicted_s == pytest.approx(9e-4)
    assert choose(costs, whole, [need], Work(1000, 0), way="load").predicted_s == pytest.approx(16e-4)


def test_larger_pieces_come_sooner() -> None:
    costs = dataclasses.replace(linear(1.0), link=((10_000, 1e8), (1_280_000, 1e9)))
    need = Need(100, 0, 100, 0)
    apart, together = EIGHT, dataclasses.replace(EIGHT, groups=(0,), run_pages=16)
    by_layer = choose(costs, apart, [need], NOTHING, way="load").predicted_s
    assert by_layer == pytest.approx(8 * 1e5 / 1e8)
    assert choose(costs, together, [need], NOTHING, way="load").predicted_s == pytest.approx(8 * 1e5 / 1e9)


def test_unpacking_may_take_all_that_loading_saves() -> None:
    need = Need(100, 0, 100, 0)
    assert choose(linear(1e-6, 1e12, unpack_s=0.9e-6), EIGHT, [need], NOTHING).way == "load"
    assert choose(linear(1e-6, 1e12, unpack_s=1.1e-6), EIGHT, [need], NOTHING).way == "recompute"


def test_splits_may_be_confined() -> None:
    confined = dataclasses.replace(EIGHT, splits=(2, 6))
    need = Need(100, 0, 100, 0)
    assert choose(linear(1e-6), confined, [need], NOTHING).first_layer in (2, 6)
    assert choose(linear(1e-6), dataclasses.replace(EIGHT, splits=()), [need], NOTHING).way == "recompute"


@pytest.mark.parametrize("way", ["auto", "load", "recompute", "split"])
def test_without_needs_nothing_is_loaded(way: str) -> None:
    choice = choose(BASE, EIGHT, [], Work(10, 100), way=way)
    assert (choice.first_layer, choice.way, choice.by_way) == (8, "recompute", {"recompute": choice.predicted_s})
    assert choice.predicted_s == pytest.approx(8e-5)


def test_over_an_unknown_link_only_what_must_be_loaded_is() -> None:
    unknown, needs = dataclasses.replace(BASE, link=()), [Need(100, 0, 100, 4)]
    choice = choose(unknown, EIGHT, needs, NOTHING)
    assert (choice.first_layer, choice.by_way) == (8, {"recompute": pytest.approx(8 * 104e-6)})
    forced = choose(unknown, EIGHT, needs, NOTHING, way="load")
    assert (forced.first_layer, forced.predicted_s) == (0, pytest.approx(8 * 4e-6))
    assert choose(unknown, EIGHT, needs, NOTHING, way="split").first_layer == 1


def test_a_single_layer_cannot_be_split() -> None:
    one = Layout(layers=1, page_tokens=10, layer_bytes=10_000)
    need = Need(100, 0, 100, 0)
    assert choose(costs_for_cpu(), one, [need], NOTHING).way == "load"
    forced = choose(costs_for_cpu(), one, [need], NOTHING, way="split")
    assert (forced.way, forced.first_layer, set(forced.by_way)) == ("recompute", 1, {"recompute", "load"})


def test_free_loading_is_always_chosen() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        choice = choose(costs_for_cpu(), random_layout(rng), random_needs(rng), random_others(rng))
        assert (choice.way, choice.first_layer) == ("load", 0)


def test_ways_are_named() -> None:
    with pytest.raises(InvalidArgument, match="'both' is not one of") as caught:
        choose(BASE, EIGHT, [], NOTHING, way="both")
    assert caught.value.field == "restore"


def test_a_users_work_is_what_its_rows_see() -> None:
    rng = np.random.default_rng(1)
    for need in random_needs(rng):
        work = user_work(need.cached, need.prefix, need.candidates, need.frozen)
        seen = visible_keys(need, need.cached, need.prefix) + need.candidates * (need.prefix + 1)
        assert work == (need.prefix - need.cached + need.candidates, seen)
