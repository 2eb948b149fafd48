"""Seeded traces whose marginals follow published figures: calibrated-synthetic, never real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mtserve.trace.calendar import DAY_MS, DAY_S
from mtserve.trace.csr import cuts, offsets_of
from mtserve.trace.generator.arrivals import kuairand_pauses, request_times
from mtserve.trace.generator.attendance import Attendance
from mtserve.trace.generator.bursts import BurstLoad
from mtserve.trace.generator.clock import Clock
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.crowds import Visits, crowd_requests, draw_visits
from mtserve.trace.generator.draft import Draft
from mtserve.trace.generator.groups import Habits
from mtserve.trace.generator.launches import launch
from mtserve.trace.generator.newcomers import Newcomers
from mtserve.trace.generator.tastes import Tastes, click_rates
from mtserve.trace.outline import Outline
from mtserve.trace.reshape import SESSION_GAP_MS, sessions_by_gap
from mtserve.trace.schema import CLICK, Floats, Ints, Progress, SmallInts, Trace, TraceMeta

MAX_ROW = 32_768  # most candidates of one request
BLOCK_REQUESTS = 1 << 17
BLOCK_BEHAVIOURS = 1 << 21
# What each stream of random numbers is for. Later ones are only drawn from by knobs that are in use, so that
# no knob changes what the others draw; new ones go to the end.
STREAMS = ("activity", "times", "taste", "rows", "past", "groups", "newcomers", "bursts", "crowds", "launches", "week")


@dataclass(frozen=True)
class Users:
    """Who the users are: their habits, their tastes, who is new, and when each is there."""

    habits: Habits
    newcomers: Newcomers
    tastes: Tastes
    clock: Clock
    activity_z: Floats  # [users] standard normal


def generate(config: GeneratorConfig, progress: Progress | None = None) -> Trace:
    """A trace of `config.users` users and exactly `config.requests` requests beside those of crowds.

    The same config gives the same trace. progress: called with (requests done, requests in all). A user may
    have no request.
    """
    streams = _streams(config)
    users = _users(streams, config)
    draft = _with_crowds(streams["crowds"], config, users, _requests(streams, config, users, progress))
    if config.launches.items:
        draft = launch(streams["launches"], config.launches, draft, config.days * DAY_MS, config.items)
    columns = draft.columns(config.start_ms)
    return Trace(
        user_ids=_user_ids(config),
        **_histories(streams["past"], config, users), **columns,
        session=sessions_by_gap(columns["user"], columns["t_ms"], SESSION_GAP_MS), meta=_meta(config),
    )  # fmt: skip


def outline(config: GeneratorConfig) -> Outline:
    """`generate` without items, many times as fast: the same users at the same times with as many candidates, and
    histories of the same lengths. Clicks are drawn anew: of each candidate with the same chance, whatever it is.
    """
    streams = _streams(config)
    users = _users(streams, config)
    user, t_ms = _arrivals(streams, config, users)
    candidates = _candidate_counts(streams["rows"], config, len(user))
    if config.crowds.events:
        visits = _visits(streams["crowds"], config, users, user, t_ms)
        lengths = _candidate_counts(streams["crowds"], config, len(visits.user))
        order = np.argsort(np.concatenate([t_ms, visits.t_ms]), kind="stable")
        user, t_ms = np.concatenate([user, visits.user])[order], np.concatenate([t_ms, visits.t_ms])[order]
        candidates = np.concatenate([candidates, lengths])[order]
    clicks = streams["rows"].binomial(candidates, config.click_rate)
    history = np.minimum(_history_lengths(streams["past"], config, users), users.newcomers.most_history)
    return Outline(_user_ids(config), user, t_ms + config.start_ms, candidates, clicks, history)


def _streams(config: GeneratorConfig) -> dict[str, np.random.Generator]:
    seeds = np.random.SeedSequence(config.seed).spawn(len(STREAMS))
    return {name: np.random.default_rng(seed) for name, seed in zip(STREAMS, seeds, strict=True)}


def _user_ids(config: GeneratorConfig) -> tuple[str, ...]:
    return tuple(f"u{number}" for number in range(config.users))


def _meta(config: GeneratorConfig) -> TraceMeta:
    bursts = f", its bursts to those of Azure's {config.bursts.like} service" if config.bursts.levels else ""
    return TraceMeta(
        name=config.name,
        source=f"mtserve generator, fitted to published KuaiRand-27K figures{bursts}",
        seed=config.seed,
        calibrated_synthetic=True,
        config=config.facts(),
    )


def _users(streams: dict[str, np.random.Generator], config: GeneratorConfig) -> Users:
    activity_z = streams["activity"].standard_normal(config.users)
    habits = Habits.draw(streams["groups"], config.user_groups, config.users)
    newcomers = Newcomers.draw(
        streams["newcomers"], config.newcomers, config.users, config.days, config.history_sigma, config.history_max
    )
    levels = config.bursts.levels
    bursts = BurstLoad.draw(streams["bursts"], levels, config.days * DAY_S) if levels else None
    attendance = Attendance.draw(streams["week"], config.week.weekend, config.start_ms, config.days, newcomers)
    taste = np.minimum(config.taste * habits.of("taste"), 1.0)
    return Users(
        habits,
        newcomers,
        Tastes.draw(streams["taste"], config.users, config.items, config.categories, config.popularity_exponent, taste),
        Clock.of(config.week, attendance, newcomers, habits.of("later"), bursts, config.bursts.moves),
        activity_z,
    )


def _requests(
    streams: dict[str, np.random.Generator], config: GeneratorConfig, users: Users, progress: Progress | None
) -> Draft:
    """The requests of all users, without crowds: how many of whom, when, for which candidates."""
    user, t_ms = _arrivals(streams, config, users)
    return _candidates(streams["rows"], config, users, user, t_ms, progress)


def _arrivals(streams: dict[str, np.random.Generator], config: GeneratorConfig, users: Users) -> tuple[SmallInts, Ints]:
    """(user, ms from the trace's start) [requests] in order of time, without crowds."""
    days_there = users.clock.attendance.span_s / users.clock.attendance.window_s
    weights = np.exp(config.activity_sigma * users.activity_z) * users.habits.of("activity") * days_there
    counts = streams["activity"].multinomial(config.requests, weights / weights.sum())
    pauses = kuairand_pauses(config.long_gap_hours * 3600)
    return request_times(streams["times"], counts, users.clock, pauses, users.habits.of("gap"))


def _candidates(
    rng: np.random.Generator,
    config: GeneratorConfig,
    users: Users,
    user: SmallInts,
    t_ms: Ints,
    progress: Progress | None,
) -> Draft:
    """Candidates and clicks of requests of `user` at `t_ms` [N], by blocks of requests."""
    offsets = offsets_of(_candidate_counts(rng, config, len(user)))
    cand = np.empty(offsets[-1], dtype=np.int64)
    clicked = np.empty(offsets[-1], dtype=np.bool_)
    outside, inside = _click_rates(config, users)
    for first, last in cuts(offsets, BLOCK_REQUESTS, BLOCK_BEHAVIOURS):
        part = slice(offsets[first], offsets[last])
        lengths = np.diff(offsets[first : last + 1])
        picks, liked = users.tastes.distinct(rng, user[first:last], lengths)
        cand[part] = users.tastes.ids[picks]
        who = np.repeat(user[first:last], lengths)
        clicked[part] = rng.random(len(picks)) < np.where(liked, inside[who], outside[who])
        if progress is not None:
            progress(last, len(user))
    return Draft(user, t_ms, offsets, cand, clicked)


def _click_rates(config: GeneratorConfig, users: Users) -> tuple[Floats, Floats]:
    """([users], [users]) share clicked of candidates outside and inside each user's favourites."""
    tastes, of = np.unique(users.tastes.taste, return_inverse=True)
    rates = np.array([click_rates(config.click_rate, taste, config.taste_lift) for taste in tastes.tolist()])
    return rates[of, 0], rates[of, 1]


def _candidate_counts(rng: np.random.Generator, config: GeneratorConfig, requests: int) -> Ints:
    """[requests] at least 1, at most half of the items and MAX_ROW."""
    if config.candidates_spread == "fixed" or config.candidates_mean == 1:
        return np.full(requests, round(config.candidates_mean), dtype=np.int64)
    counts = rng.geometric(1 / config.candidates_mean, requests)
    return np.minimum(counts, min(MAX_ROW, config.items // 2)).astype(np.int64)


def _with_crowds(rng: np.random.Generator, config: GeneratorConfig, users: Users, draft: Draft) -> Draft:
    """The requests, and those of the crowds between them."""
    if not config.crowds.events:
        return draft
    visits = _visits(rng, config, users, draft.user, draft.t_ms)
    lengths = _candidate_counts(rng, config, len(visits.user))
    return draft.merged(crowd_requests(rng, config.crowds, visits, lengths, users.tastes, config.click_rate))


def _visits(rng: np.random.Generator, config: GeneratorConfig, users: Users, user: SmallInts, t_ms: Ints) -> Visits:
    """Those of crowds beside the requests of `user` at `t_ms` [N]."""
    first_ms = (users.clock.attendance.first_s * 1000).astype(np.int64)
    pauses = kuairand_pauses(config.long_gap_hours * 3600)
    return draw_visits(rng, config.crowds, user, t_ms, first_ms, config.days * DAY_MS, pauses)


def _histories(rng: np.random.Generator, config: GeneratorConfig, users: Users) -> dict[str, Any]:
    """The history columns: lognormal lengths, times spread evenly over `history_days`."""
    offsets = offsets_of(_history_lengths(rng, config, users))
    items, t_ms = np.empty(offsets[-1], dtype=np.int64), np.empty(offsets[-1], dtype=np.int64)
    taste = _clicked_taste(config, users)
    for first, last in cuts(offsets, config.users, BLOCK_BEHAVIOURS):
        part = slice(offsets[first], offsets[last])
        user = np.repeat(np.arange(first, last), np.diff(offsets[first : last + 1]))
        items[part] = users.tastes.ids[users.tastes.pick(rng, user, taste)[0]]
        t_ms[part] = _history_times(rng, offsets[first : last + 1] - offsets[first], config)
    # Newcomers' histories are drawn like the others' and then cut, which leaves the others' as they are.
    kept = np.minimum(np.diff(offsets), users.newcomers.most_history)
    starts = offsets_of(kept)
    places = np.repeat(offsets[1:] - starts[1:], kept) + np.arange(starts[-1])
    return {
        "history_offsets": starts,
        "history_items": items[places],
        "history_t_ms": t_ms[places],
        "history_actions": np.full(len(places), CLICK, dtype=np.int32),
    }


def _history_lengths(rng: np.random.Generator, config: GeneratorConfig, users: Users) -> Ints:
    """[users] before newcomers' are cut."""
    own = rng.standard_normal(config.users)
    mixed = config.history_activity * users.activity_z + np.sqrt(1 - config.history_activity**2) * own
    # Clipped before exp, which would overflow for no good reason.
    lengths = config.history_median * np.exp(np.clip(config.history_sigma * mixed, -50, 50))
    return np.minimum(np.rint(lengths * users.habits.of("history")), config.history_max).astype(np.int64)


def _clicked_taste(config: GeneratorConfig, users: Users) -> Floats:
    """[users] share of clicks on favourites."""
    inside = _click_rates(config, users)[1]
    taste = users.tastes.taste
    return taste * inside / config.click_rate if config.click_rate else taste


def _history_times(rng: np.random.Generator, offsets: Ints, config: GeneratorConfig) -> Ints:
    """Ascending times of each row, uniform over the days before the trace: normalised exponential spacings."""
    lengths = np.diff(offsets)
    row = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.concatenate([[0.0], np.cumsum(rng.exponential(1.0, len(row)))])
    total = sums[offsets[1:]] - sums[offsets[:-1]] + rng.exponential(1.0, len(lengths))
    share = (sums[1:] - sums[offsets[:-1]][row]) / total[row]
    return config.start_ms - DAY_MS * config.history_days + (share * config.history_days * DAY_MS).astype(np.int64)
