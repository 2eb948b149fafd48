"""Calibrated figures: what they say, how they are written, what is refused."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
from restore_samples import random_costs

from mtserve.errors import InvalidArgument
from mtserve.restore.costs import Costs, costs_for_cpu
from mtserve.restore.fit import fit_nonnegative

COSTS = random_costs(np.random.default_rng(0))


def test_rates_follow_the_size_of_a_piece() -> None:
    costs = Costs(((100, 10.0), (1000, 30.0), (10_000, 40.0)), 0, 0, 0, 0, 0, 0)
    assert [costs.bytes_per_s(size) for size in (100, 1000, 10_000, 10**9)] == [10, 30, 40, 40]
    assert costs.bytes_per_s(50) == 5  # as long as a piece of 100
    assert math.isclose(costs.bytes_per_s(round(100 * 10**0.5)), 20, rel_tol=0.01)
    rates = [costs.bytes_per_s(size) for size in range(1, 12_000, 7)]
    assert rates == sorted(rates)


def test_a_layer_takes_the_sum_of_its_parts() -> None:
    costs = Costs((), 0, 1.0, 0.5, 0.25, 0.125, 0)
    assert costs.compute_s(4, 8) == 0.5 + 1 + 1


def test_costs_come_back_from_json() -> None:
    for costs in (COSTS, costs_for_cpu(), Costs((), 0, 0, 0, 0, 0, 0)):
        assert Costs.from_table(json.loads(json.dumps(costs.to_table()))) == costs


def test_costs_that_were_asked_can_be_copied() -> None:
    costs = random_costs(np.random.default_rng(2))
    taken = costs.compute_s(3, 5)
    copied = copy.deepcopy(costs)
    assert copied == costs
    assert copied.compute_s(3, 5) == taken


@pytest.mark.parametrize("field", list(COSTS.to_table()))
def test_every_field_is_needed_and_no_other_known(field: str) -> None:
    table = COSTS.to_table()
    del table[field]
    with pytest.raises(InvalidArgument, match="missing") as caught:
        Costs.from_table(table)
    assert caught.value.field == field
    with pytest.raises(InvalidArgument, match="unknown") as caught:
        Costs.from_table({**COSTS.to_table(), field + "s": 0})
    assert caught.value.field == field + "s"


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, "1", None, True, [1]])
@pytest.mark.parametrize("field", ["load_s", "batch_s", "layer_s", "row_s", "pair_s", "unpack_s"])
def test_seconds_are_finite_and_not_negative(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="expected seconds") as caught:
        Costs.from_table({**COSTS.to_table(), field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    "link",
    [None, 3, "ab", [3], [[1]], [[1, 2, 3]], [["1", 2]], [[1.5, 2]], [[0, 2]], [[True, 2]], [[1, 0]], [[1, -2]],
     [[1, math.inf]], [[1, math.nan]], [[1, "2"]], [[2, 1], [2, 1]], [[2, 1], [1, 1]]],
)  # fmt: skip
def test_a_link_is_rising_sizes_with_rates(link: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Costs.from_table({**COSTS.to_table(), "link": link})
    assert caught.value.field == "link"


@pytest.mark.parametrize("table", [None, [], "costs", 7])
def test_only_a_table_is_read(table: Any) -> None:
    with pytest.raises(InvalidArgument, match="expected a table"):
        Costs.from_table(table)


def test_fits_find_what_is_not_negative() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        terms, truth = rng.random((8, 3)), rng.random(3) * rng.integers(0, 2, 3)
        assert np.allclose(fit_nonnegative(terms, terms @ truth), truth, atol=1e-9)


def test_fits_are_the_best_of_all_that_are_not_negative() -> None:
    """At the optimum no step that is allowed lowers the error: its gradient is 0, or up where the coefficient is 0."""
    rng = np.random.default_rng(3)
    at_bounds = 0
    for _ in range(100):
        terms, values = rng.standard_normal((6, 3)), rng.standard_normal(6)
        found = fit_nonnegative(terms, values)
        gradient = terms.T @ (terms @ found - values)
        assert (found >= 0).all()
        assert np.allclose(gradient[found > 0], 0, atol=1e-9)
        assert (gradient[found == 0] >= -1e-9).all()
        at_bounds += int((found == 0).any())
    assert at_bounds > 50
