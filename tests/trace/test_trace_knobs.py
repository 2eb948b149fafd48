"""What each knob of the generator does to its marginal, and that it leaves the rest alone."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mtserve.errors import InvalidArgument
from mtserve.trace.attendance import DAY_MS
from mtserve.trace.burstiness import WINDOWS_S, burst_figures
from mtserve.trace.bursts import BurstConfig, BurstLoad, load_variance
from mtserve.trace.calibration import AZURE, BURST_LEVELS, GAP_LABELS, KUAIRAND
from mtserve.trace.clock import WeekConfig
from mtserve.trace.crowds import CrowdConfig
from mtserve.trace.generator import generate
from mtserve.trace.generator_config import MAX_REQUESTS, GeneratorConfig
from mtserve.trace.groups import PRESETS, UserGroup, groups_text, parse_groups
from mtserve.trace.info import info
from mtserve.trace.launches import MAX_LAUNCHES, LaunchConfig
from mtserve.trace.meta import meta_to_json
from mtserve.trace.newcomers import NewcomerConfig
from mtserve.trace.schema import Trace

START_MS = GeneratorConfig().start_ms
COLUMNS = (
    "history_offsets", "history_items", "history_t_ms", "history_actions", "user", "t_ms", "session",
    "cand_offsets", "cand_items", "clicked_offsets", "clicked_items", "clicked_actions",
)  # fmt: skip
ALL_KNOBS: dict[str, Any] = {
    "groups": "heavy casual:share=0.3 night early:share=0.1,later=20,gap=0.1",
    "week": WeekConfig(night=0.5, weekend=0.5),
    "bursts": BurstConfig(like="code", moves="requests"),
    "crowds": CrowdConfig(events=5, load=20.0, users=0.3, items=7),
    "newcomers": NewcomerConfig(share=0.3, over_days=4, history=6),
    "launches": LaunchConfig(items=30, share=0.2),
}


def made(**knobs: Any) -> Trace:
    """A trace of 500 users and 20,000 requests of one candidate each, but for `knobs`."""
    plain = {"users": 500, "requests": 20_000, "history_median": 0, "candidates_mean": 1.0, "clicks_mean": 0.4}
    return generate(GeneratorConfig(**{**plain, **knobs}))


def digest(trace: Trace) -> str:
    hashed = hashlib.sha256(meta_to_json(trace.meta).encode())
    for name in COLUMNS:
        hashed.update(getattr(trace, name).tobytes())
    return hashed.hexdigest()[:32]


@pytest.mark.parametrize(
    ("expected", "knobs"),
    [
        ("c430def7c24efb233b77cd3afeeb4b72", {"users": 20, "requests": 500, "seed": 4, "history_median": 10}),
        (
            "01a13757abcd95ed7059852b2ff8f081",
            {
                "users": 30, "requests": 400, "days": 3, "seed": 9, "history_median": 20, "items": 4000,
                "candidates_mean": 40.0, "candidates_spread": "fixed", "taste": 0.3,
            },
        ),
        ("1bb36fce9f2606a1b75bbaa56bfcc595", {"users": 1000, "requests": 60_000, "history_median": 100}),
    ],
)  # fmt: skip
def test_traces_without_these_knobs_are_what_they_were_before_them(expected: str, knobs: dict[str, Any]) -> None:
    assert digest(generate(GeneratorConfig(**knobs))) == expected


# Crowds


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


def digest_of_columns(trace: Trace) -> list[bytes]:
    return [getattr(trace, name).tobytes() for name in COLUMNS]


# Bursts


def starts_s(trace: Trace) -> np.ndarray:
    """Ascending seconds at which sessions start."""
    _, first = np.unique(trace.session, return_index=True)
    return np.sort(trace.t_ms[first]) / 1000


@pytest.mark.parametrize("like", sorted(BURST_LEVELS))
def test_moved_requests_have_the_published_load_variance(like: str) -> None:
    busy = {"users": 6_000, "requests": 900_000, "days": 3, "week": WeekConfig(night=0.0)}
    trace = made(**busy, bursts=BurstConfig(like=like, moves="requests"))
    figures = burst_figures(trace.t_ms / 1000)
    for window in map(str, WINDOWS_S):
        published = AZURE[like]["load_variance"][window]
        assert figures["load_variance"][window] == pytest.approx(published, rel=0.35), window


def test_moved_sessions_start_in_bursts_and_keep_every_gap() -> None:
    knobs = {"users": 3_000, "requests": 300_000, "week": WeekConfig(night=0.0)}
    plain, moved = made(**knobs), made(**knobs, bursts=BurstConfig(like="code"))
    figures = burst_figures(starts_s(moved))["load_variance"]
    for window in map(str, WINDOWS_S[:3]):
        assert figures[window] == pytest.approx(AZURE["code"]["load_variance"][window], rel=0.4), window
    assert burst_figures(starts_s(plain))["load_variance"]["10"] < 0.2
    before, after = info(plain)["gap_s"]["shares"], info(moved)["gap_s"]["shares"]
    for label in GAP_LABELS:
        assert after[label] == pytest.approx(before[label], abs=0.002), label
    assert np.array_equal(np.bincount(plain.user), np.bincount(moved.user))


def test_bursts_keep_the_hours() -> None:
    plain, moved = made(), made(bursts=BurstConfig(like="code", moves="requests", strength=2.0))
    assert np.array_equal(plain.t_ms // 3_600_000, moved.t_ms // 3_600_000)
    assert np.array_equal(plain.cand_lengths, moved.cand_lengths)
    calm = made(bursts=BurstConfig(like="code", strength=0.0))
    assert np.array_equal(plain.t_ms, calm.t_ms)


def test_a_drawn_load_has_the_variance_of_its_formula() -> None:
    levels = BURST_LEVELS["code"]
    load = BurstLoad.draw(np.random.default_rng(1), levels, 400_000.0)
    for window in (10.0, 60.0):
        means = np.diff(np.interp(np.arange(0, 400_001, window), load.edges, load.sums)) / window
        assert means.mean() == pytest.approx(1, abs=0.1)
        expected = load_variance(levels, np.array([window]))[0]
        assert means.var() / means.mean() ** 2 == pytest.approx(expected, rel=0.2)


def test_burst_figures_by_hand() -> None:
    even = burst_figures(np.arange(0, 7_200, 1.0) + 0.5)
    assert even["dispersion"] == {"1": 0.0, "10": 0.0, "60": 0.0, "300": 0.0}
    assert even["gap_scv"] == pytest.approx(0)
    assert even["minute_correlation"] is None, "counts that never vary"
    # Two arrivals in the first of ten windows: counts 2, 0, ..., 0 of mean 0.2 and variance 0.4.
    pair = burst_figures(np.array([1.0, 2.0]), block_s=100.0)
    assert pair["dispersion"]["10"] == pytest.approx(0.4 / 0.2)
    assert pair["load_variance"]["10"] is None, "the mean is not known well enough"
    assert pair["gap_scv"] is None
    poisson = burst_figures(np.sort(np.random.default_rng(0).random(200_000) * 36_000))
    assert poisson["gap_scv"] == pytest.approx(1, abs=0.02)
    for window in WINDOWS_S:
        assert poisson["dispersion"][str(window)] == pytest.approx(1, abs=0.3)
    assert set(burst_figures(np.empty(0))["dispersion"].values()) == {None}


# Day and week


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


# Newcomers


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


# Groups


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


# Launches


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


# All of them


def test_all_knobs_together_make_a_valid_trace_twice() -> None:
    config = GeneratorConfig(
        users=300, requests=5_000, days=10, history_median=20, items=400, categories=7, seed=3, **ALL_KNOBS
    )
    trace = generate(config)
    assert trace.requests == 5_000 + 5 * config.crowds.requests(5_000, 10)
    assert trace == generate(config)
    assert trace.meta.config["crowds.events"] == 5
    assert "conversation" not in trace.meta.source
    assert "code" in trace.meta.source
    highest = 400 + MAX_LAUNCHES + 5 * 7
    assert trace.cand_items.max() <= highest
    assert (trace.cand_items > 400 + MAX_LAUNCHES).any()
    for request in trace.iter_requests():
        assert len(set(request.cand.tolist())) == len(request.cand)


@pytest.mark.parametrize(("users", "requests", "days"), [(1, 0, 1), (1, 1, 1), (2, 50, 1), (3, 40, 2)])
def test_all_knobs_hold_for_next_to_nothing(users: int, requests: int, days: int) -> None:
    knobs = {**ALL_KNOBS, "newcomers": NewcomerConfig(share=0.5, over_days=1)}
    trace = generate(GeneratorConfig(users=users, requests=requests, days=days, history_median=3, **knobs))
    assert trace.users == users
    assert trace.requests >= requests


def test_extremes_of_all_knobs_hold() -> None:
    trace = made(
        days=2,
        groups="a:share=0.5,activity=1000,history=1000,gap=100,taste=1000,later=24 b:share=0.5,activity=0.001,gap=0.01",
        week=WeekConfig(night=2.0, weekend=20.0),
        bursts=BurstConfig(like="code", strength=10.0),
        crowds=CrowdConfig(events=20, users=1.0, load=50.0, minutes=1_440.0, items=2, item_share=1.0),
        newcomers=NewcomerConfig(share=1.0, over_days=2, history=1_000_000),
        launches=LaunchConfig(items=1_000, share=1.0, half_life_hours=0.1),
        history_median=2,
    )
    assert trace.t_ms[-1] < START_MS + 2 * DAY_MS
    assert trace.requests > 20_000


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("weekend", lambda: WeekConfig(weekend=0.0)),
        ("night", lambda: WeekConfig(night=-1.0)),
        ("like", lambda: BurstConfig(like="azure")),
        ("moves", lambda: BurstConfig(moves="users")),
        ("events", lambda: CrowdConfig(events=-1)),
        ("minutes", lambda: CrowdConfig(minutes=0.0)),
        ("share", lambda: NewcomerConfig(share=1.1)),
        ("half_life_hours", lambda: LaunchConfig(half_life_hours=0.0)),
        ("items", lambda: LaunchConfig(items=MAX_LAUNCHES + 1)),
        ("days", lambda: GeneratorConfig(days=500, bursts=BurstConfig(like="code"))),
        ("newcomers.over_days", lambda: GeneratorConfig(newcomers=NewcomerConfig(over_days=8))),
        ("crowds.load", lambda: GeneratorConfig(requests=MAX_REQUESTS, crowds=CrowdConfig(events=1))),
        ("week.weekend", lambda: GeneratorConfig(users=50_000_000, days=31, week=WeekConfig(weekend=0.5))),
        ("crowds", lambda: GeneratorConfig.from_table({"crowds": 3})),
        ("crowds.events", lambda: GeneratorConfig.from_table({"crowds": {"events": 1.5}})),
    ],
)
def test_bad_parts_are_named(field: str, part: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        part()
    assert caught.value.field == field
