"""Flash crowds and item launches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from knob_traces import digest_of_columns, made

from mtserve.trace.calendar import DAY_MS
from mtserve.trace.calibration import GAP_LABELS, KUAIRAND
from mtserve.trace.generator.clock import WeekConfig
from mtserve.trace.generator.crowds import CrowdConfig
from mtserve.trace.generator.launches import LaunchConfig
from mtserve.trace.info import info


def test_crowds_come_on_top_and_leave_every_other_request_as_it_was() -> None:
    knobs: dict[str, Any] = {"candidates_mean": 5.8, "clicks_mean": 2.2, "history_median": 5}
    crowds = CrowdConfig(events=3, load=5.0, minutes=60.0, users=0.2)
    plain, both = made(**knobs), made(**knobs, crowds=crowds)
    each = crowds.requests(20_000, 7)
    assert each == round(5 * 20_000 / (7 * 24))
    assert both.requests == plain.requests + 3 * each
    ids = {(r.user, r.t_ms, r.cand.tobytes(), r.clicked.tobytes()) for r in both.iter_requests()}
    assert all((r.user, r.t_ms, r.cand.tobytes(), r.clicked.tobytes()) in ids for r in plain.iter_requests())
    assert np.array_equal(both.history_items, plain.history_items)


def test_a_crowd_is_many_who_would_not_have_come_for_items_of_its_own() -> None:
    crowds = CrowdConfig(events=1, load=30.0, minutes=30.0, users=0.3, items=40, item_share=0.7)
    knobs: dict[str, Any] = {"candidates_mean": 5.8, "clicks_mean": 2.2}
    plain, both = made(**knobs), made(**knobs, crowds=crowds)
    own = both.cand_items > 100_000
    rows = np.unique(np.repeat(np.arange(both.requests), both.cand_lengths)[own])
    start, end = both.t_ms[rows[0]], both.t_ms[rows[-1]]
    assert end - start < 30 * 60_000
    during = (both.t_ms >= start) & (both.t_ms <= end)
    there_anyway = set(plain.user[(plain.t_ms >= start - 1_800_000) & (plain.t_ms <= end + 1_800_000)].tolist())
    assert not there_anyway & set(both.user[rows].tolist())
    assert len(set(both.user[rows].tolist())) == pytest.approx(0.3 * 500, rel=0.03)
    mean_load = 20_000 / (7 * 48)
    assert during.sum() - len(there_anyway) * 40 < 31 * mean_load
    assert both.requests - plain.requests == round(30 * mean_load)
    assert np.unique(both.cand_items[own]).size <= 40
    crowd_cand = np.isin(np.repeat(np.arange(both.requests), both.cand_lengths), rows)
    assert own.sum() / crowd_cand.sum() == pytest.approx(0.7, abs=0.05)
    _, firsts = np.unique(both.user[rows], return_index=True)
    assert np.median(both.t_ms[rows[firsts]] - start) < 9 * 60_000, "the rush comes early"
    for request in both.iter_requests():
        assert len(set(request.cand.tolist())) == len(request.cand)


def test_users_of_a_crowd_pause_as_users_do() -> None:
    # The visits are short enough not to have to hurry.
    trace = made(crowds=CrowdConfig(events=2, load=1.0, users=1.0, minutes=600.0))
    shares = info(trace)["gap_s"]["shares"]
    assert shares["< 1 s"] < 0.001
    for label, published in zip(GAP_LABELS[:4], KUAIRAND["gap_shares"][:4], strict=True):
        assert shares[label] == pytest.approx(published, abs=0.05), label


@pytest.mark.parametrize(
    "crowds",
    [
        CrowdConfig(events=3, users=0.0),
        CrowdConfig(events=3, load=0.0),
        CrowdConfig(events=0, users=1.0, load=100.0),
    ],
)
def test_a_crowd_of_no_one_changes_nothing(crowds: CrowdConfig) -> None:
    assert digest_of_columns(made(crowds=crowds)) == digest_of_columns(made())


def test_launched_items_are_popular_at_once_and_fade() -> None:
    launches = LaunchConfig(items=1, share=0.2, half_life_hours=24.0)
    knobs: dict[str, Any] = {"users": 2_000, "requests": 200_000, "week": WeekConfig(night=0.0)}
    plain, trace = made(**knobs), made(**knobs, launches=launches)
    new = trace.cand_items == 100_001
    assert np.array_equal(trace.cand_items[~new], plain.cand_items[~new])
    for name in ("user", "t_ms", "cand_offsets", "clicked_offsets"):
        assert np.array_equal(getattr(trace, name), getattr(plain, name))
    born = trace.t_ms[np.argmax(new)]
    for day in range(min(3, int((trace.t_ms[-1] - born) // DAY_MS))):
        there = (trace.t_ms >= born + day * DAY_MS) & (trace.t_ms < born + (day + 1) * DAY_MS)
        mean_share = 0.2 * 0.5**day * 0.5 / np.log(2)
        assert new[there].mean() == pytest.approx(mean_share, rel=0.08)
    clicks = (trace.clicked_items == 100_001).sum() / len(trace.clicked_items)
    assert clicks == pytest.approx(new.mean(), rel=0.1)


def test_many_launches_share_what_there_is_and_no_request_lists_one_twice() -> None:
    launches = LaunchConfig(items=300, share=1.0, half_life_hours=1.0)
    trace = made(candidates_mean=20.0, clicks_mean=2.0, requests=4_000, launches=launches)
    assert 0.1 < (trace.cand_items > 100_000).mean() < 0.9
    for request in trace.iter_requests():
        assert len(set(request.cand.tolist())) == len(request.cand)
    seen = np.unique(trace.cand_items[trace.cand_items > 100_000]) - 100_001
    assert seen.min() >= 0
    assert seen.max() < 300
    assert len(seen) > 200


def test_launches_without_share_change_nothing() -> None:
    assert digest_of_columns(made(launches=LaunchConfig(items=9, share=0.0))) == digest_of_columns(made())


def test_before_the_first_launch_there_is_nothing_to_show() -> None:
    launches = LaunchConfig(items=1, share=1.0, half_life_hours=0.1)
    with np.errstate(all="raise", under="ignore"):
        trace = made(requests=5_000, launches=launches)
    first = int(np.argmax(trace.cand_items == 100_001))
    assert first > 0
    assert np.array_equal(trace.cand_items[:first], made(requests=5_000).cand_items[:first])
