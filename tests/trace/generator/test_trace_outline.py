"""Outlines: what `generate` makes of the same config, but for the items."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from knob_traces import ALL_KNOBS

from mtserve.model.presets import preset
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate, outline
from mtserve.trace.outline import Outline
from mtserve.trace.simulate.demand import demand_of


@pytest.mark.parametrize("knobs", [{}, ALL_KNOBS, {"candidates_spread": "fixed", "candidates_mean": 3.0}])
def test_outline_has_the_arrivals_and_lengths_of_the_trace(knobs: dict[str, Any]) -> None:
    config = GeneratorConfig(users=300, requests=9_000, history_median=20, **knobs)
    trace, found = generate(config), outline(config)
    assert (found.users, found.user_ids) == (trace.users, trace.user_ids)
    for name in ("user", "t_ms", "cand_lengths", "history_lengths"):
        expected = getattr(trace, name)
        assert getattr(found, name).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(found, name), expected, name)
    clicked, expected = found.clicked_lengths, trace.clicked_lengths
    assert (clicked <= found.cand_lengths).all() and clicked.min() >= 0
    # Six standard deviations of the difference of two sums of so many clicks.
    assert abs(int(clicked.sum()) - int(expected.sum())) < 6 * np.sqrt(2 * expected.sum())


def test_demand_of_an_outline_is_that_of_the_trace() -> None:
    config = GeneratorConfig(users=40, requests=1_500, history_median=200)
    trace = generate(config)
    drawn = outline(config)
    same = replace(drawn, clicked_lengths=trace.clicked_lengths)
    assert isinstance(same, Outline)
    model = replace(preset("kuairand"), max_history=500, max_realtime=500)
    left, right = demand_of(trace, model, 3), demand_of(same, model, 3)
    for name in vars(left):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)
    assert left.generation.max() > 0
