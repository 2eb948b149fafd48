"""When users are there, who is new, and which groups they fall into."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from knob_traces import START_MS, digest_of_columns, made

from mtserve.errors import InvalidArgument
from mtserve.trace.calendar import DAY_MS
from mtserve.trace.generator.clock import WeekConfig
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.groups import PRESETS, UserGroup, groups_text, parse_groups
from mtserve.trace.generator.newcomers import NewcomerConfig
from mtserve.trace.info import info
from mtserve.trace.schema import Trace


def test_the_daily_curve_flattens_and_steepens() -> None:
    peaks = [
        info(made(users=3_000, requests=100_000, week=WeekConfig(night=night)))["load_by_hour"]
        for night in (0.0, 0.5, 1.0, 1.6)
    ]
    assert peaks[0]["peak"] < 1.25
    assert peaks[0]["trough"] > 0.8
    assert all(a["peak"] < b["peak"] and a["trough"] > b["trough"] for a, b in pairwise(peaks))


@pytest.mark.parametrize("weekend", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("requests", [10_000, 150_000])
def test_weekends_have_their_share_of_the_load(weekend: float, requests: int) -> None:
    trace = made(users=3_000, requests=requests, days=14, week=WeekConfig(weekend=weekend))
    assert trace.requests == requests
    days = np.bincount((trace.t_ms - START_MS) // DAY_MS, minlength=14)
    is_weekend = ((trace.meta.config["start_ms"] // DAY_MS + 3 + np.arange(14)) % 7) >= 5
    assert days[is_weekend].mean() / days[~is_weekend].mean() == pytest.approx(weekend, rel=0.12, abs=0.04)


def test_a_trace_of_one_weekend_keeps_its_users() -> None:
    saturday = START_MS + 4 * DAY_MS
    trace = made(days=2, start_ms=saturday, requests=2_000, week=WeekConfig(weekend=0.05))
    assert trace.requests == 2_000
    assert trace.t_ms[-1] < saturday + 2 * DAY_MS


def test_newcomers_come_at_an_even_rate_with_little_history() -> None:
    knobs: dict[str, Any] = {"users": 2_000, "requests": 300_000, "days": 10, "history_median": 40, "items": 2_000}
    plain = made(**knobs)
    trace = made(**knobs, newcomers=NewcomerConfig(share=0.4, history=3))
    short = trace.history_lengths < plain.history_lengths
    assert short.mean() == pytest.approx(0.4, abs=0.04)
    assert np.median(trace.history_lengths[short]) == pytest.approx(3, abs=1)
    first_day = np.full(2_000, -1)
    order = np.arange(trace.requests)[::-1]
    first_day[trace.user[order]] = (trace.t_ms[order] - START_MS) // DAY_MS
    arrivals = np.bincount(first_day[short & (first_day >= 0)], minlength=10)
    assert arrivals.min() > 0.5 * 80
    assert arrivals.max() < 1.5 * 80
    assert (first_day[~short] == 0).mean() > 2 * (first_day[short] == 0).mean()
    for user in np.flatnonzero(~short)[:50]:
        assert np.array_equal(trace.history(user).items, plain.history(user).items)


def test_newcomers_can_all_come_on_the_first_days_or_be_everyone() -> None:
    trace = made(newcomers=NewcomerConfig(share=1.0, over_days=1), history_median=9)
    assert len(trace.history_items) == 0
    assert trace.requests == 20_000
    first = np.unique(trace.user, return_index=True)[1]
    assert (trace.t_ms[first] < START_MS + DAY_MS).mean() > 0.97
    assert digest_of_columns(made(newcomers=NewcomerConfig(over_days=3, history=5))) == digest_of_columns(made())


def test_groups_differ_by_their_multiples() -> None:
    text = "big:share=0.3,activity=4,history=3,gap=0.5,taste=0 owl:share=0.3,later=12"
    knobs: dict[str, Any] = {"users": 2_000, "history_median": 30, "items": 5_000, "activity_sigma": 0.0}
    plain = made(**knobs, requests=80_000)
    trace = made(**knobs, requests=80_000, groups=text)
    counts = np.bincount(trace.user, minlength=2_000)
    big = counts > 50
    assert big.mean() == pytest.approx(0.3, abs=0.04)
    assert counts[big].mean() / counts[~big].mean() == pytest.approx(4, rel=0.05)
    lengths = trace.history_lengths
    assert np.median(lengths[big]) / np.median(lengths[~big]) == pytest.approx(3, rel=0.1)
    gaps = _median_gap_in_sessions(trace)
    assert np.median(gaps[big]) / np.median(gaps[~big]) == pytest.approx(0.5, rel=0.2)
    assert trace.requests == plain.requests


def _median_gap_in_sessions(trace: Trace) -> np.ndarray:
    order = np.argsort(trace.session, kind="stable")
    user, gaps = trace.user[order][1:], np.diff(trace.t_ms[order]) / 1000
    inside = np.diff(trace.session[order]) == 0
    return np.array([np.median(gaps[inside & (user == u)]) for u in range(trace.users)])


def test_a_group_can_live_later_than_the_others() -> None:
    usual, later = (info(made(groups=text))["load_by_hour"]["shares"] for text in ("", "owl:share=1,later=12"))
    assert np.corrcoef(np.roll(usual, 12), later)[0, 1] > 0.95
    assert np.corrcoef(usual, later)[0, 1] < 0


def test_a_group_without_taste_sees_what_is_popular() -> None:
    def top_share(groups: str) -> float:
        counts = np.bincount(made(groups=groups, popularity_exponent=1.3).cand_items)
        return float(np.sort(counts)[-20:].sum() / counts.sum())

    assert top_share("plain:share=1,taste=0") > 1.15 * top_share("fans:share=1,taste=2")


def test_groups_of_no_one_change_nothing() -> None:
    assert digest_of_columns(made(groups="none:share=0,activity=9")) == digest_of_columns(made())
    assert digest_of_columns(made(groups="all:share=1")) == digest_of_columns(made())


def test_groups_are_words_or_tables() -> None:
    assert parse_groups("") == {}
    groups = parse_groups("heavy casual:share=0.25 mine:share=0.1,gap=2")
    assert groups["heavy"] == PRESETS["heavy"]
    assert groups["casual"].share == 0.25
    assert groups["casual"].activity == PRESETS["casual"].activity
    assert groups["mine"] == UserGroup(share=0.1, gap=2.0)
    tables = {"heavy": {}, "casual": {"share": 0.25}, "mine": {"share": 0.1, "gap": 2}}
    assert parse_groups(groups_text(tables)) == groups


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("mine", "groups.mine"),
        ("heavy heavy", "groups.heavy"),
        ("heavy:share", "groups.heavy"),
        ("heavy:share=many", "groups.heavy"),
        ("heavy:share=nan", "groups.heavy.share"),
        ("heavy:speed=1", "groups.heavy.speed"),
        ("heavy:activity=0", "groups.heavy.activity"),
        ("ä:share=0.1", "groups"),
        ("heavy:share=0.6 casual:share=0.5", "groups"),
        (" ".join(f"g{i}:share=0" for i in range(33)), "groups"),
        ("x" * 5_000, "groups"),
    ],
)
def test_bad_groups_are_named(text: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        GeneratorConfig(groups=text)
    assert caught.value.field == field
