"""Where a history is cut: bounds that always hold, and cuts that are rare and fall together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_config

from mtserve.config import ModelConfig
from mtserve.model.cut import Cut, cut_histories, cut_history, recut_step


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    realtime = draw(st.integers(1, 40))
    return small_config(
        max_realtime=realtime,
        max_history=draw(st.one_of(st.integers(max(2, realtime), 200), st.integers(2, 6).map(lambda n: n * realtime))),
        history_low_water=draw(st.sampled_from([0.1, 0.5, 0.75, 0.9, 0.99])),
        static_history=draw(st.booleans()),
    )


@given(config=configs(), first=st.integers(0, 30))
def test_bounds_hold_at_every_position_and_the_start_never_goes_back(config: ModelConfig, first: int) -> None:
    before = cut_history(first, config, first)
    for position in range(first, first + 3 * config.max_history):
        cut = cut_history(position, config, first)
        assert first <= cut.start <= cut.static_end <= cut.end == position
        assert cut.kept <= config.max_history
        assert cut.kept > 0 or position == first
        assert cut.start >= before.start
        assert cut.static_end >= before.static_end
        if config.static_history and position > first:
            assert 1 <= cut.end - cut.static_end <= config.max_realtime
        if not config.static_history:
            assert cut.static_end == cut.start
        before = cut


@given(config=configs())
def test_re_cuts_are_a_step_apart_and_coincide_with_folds(config: ModelConfig) -> None:
    step = recut_step(config)
    assert 1 <= step <= config.max_history
    cuts = [cut_history(position, config) for position in range(4 * config.max_history)]
    for before, after in pairwise(cuts):
        if after.start == before.start:
            continue
        assert after.start - before.start == step
        multiple = config.max_history % config.max_realtime == 0
        if config.static_history and multiple:
            assert step % config.max_realtime == 0
            assert after.static_end != before.static_end


@given(config=configs(), position=st.integers(0, 600), first=st.integers(0, 600))
def test_rows_let_go_before_the_cut_change_nothing(config: ModelConfig, position: int, first: int) -> None:
    whole = cut_history(position, config)
    assert cut_history(position, config, min(first, whole.start)) == whole


def test_a_history_cut_by_hand() -> None:
    config = small_config(max_history=40, max_realtime=10, history_low_water=0.75)
    assert recut_step(config) == 10
    expected = {
        0: (0, 0), 1: (0, 0), 10: (0, 0), 11: (0, 10), 20: (0, 10), 21: (0, 20),
        40: (0, 30), 41: (10, 40), 50: (10, 40), 51: (20, 50),
    }  # fmt: skip
    for position, (start, static_end) in expected.items():
        assert cut_history(position, config) == Cut(start, static_end, position)
    causal = small_config(max_history=40, max_realtime=10, static_history=False, history_low_water=0.5)
    assert cut_history(41, causal) == Cut(20, 20, 41)


@given(config=configs())
def test_many_at_once_are_cut_alike(config: ModelConfig) -> None:
    positions = np.arange(4 * config.max_history)
    cuts = cut_histories(positions, config)
    for position in positions.tolist():
        cut = cut_history(position, config)
        assert (cuts.start[position], cuts.static_end[position], cuts.end[position]) == (
            cut.start,
            cut.static_end,
            cut.end,
        )
        assert cuts.kept[position] == cut.kept
