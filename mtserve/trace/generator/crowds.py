"""Flash crowds: for some minutes users come who would not have, for items of the event's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtserve.config import Config, option
from mtserve.trace.csr import offsets_of, rank_in_group
from mtserve.trace.generator.arrivals import Pauses, draw_gaps
from mtserve.trace.generator.draft import Draft
from mtserve.trace.generator.launches import MAX_LAUNCHES
from mtserve.trace.generator.tastes import Tastes
from mtserve.trace.reshape import SESSION_GAP_MS
from mtserve.trace.schema import Ints, SmallInts

RUSH = 3.0  # how fast a crowd ebbs: its arrivals fall by e**-RUSH from an event's start to its end
MINUTE_MS = 60_000


@dataclass(frozen=True)
class CrowdConfig(Config):
    """How many events there are, who comes, and for what."""

    events: int = option(0, "flash crowds, at drawn times", low=0, high=1_000)
    users: float = option(0.05, "share of the users who come, of those who would not have", low=0.0, high=1.0)
    load: float = option(
        2.0, "requests that a crowd adds, as a multiple of the mean load while it lasts", low=0.0, high=1_000.0
    )
    minutes: float = option(30.0, "how long an event lasts", low=1.0, high=1_440.0, unit="min")
    items: int = option(50, "items of each event's own", low=2, high=1_000_000)
    item_share: float = option(0.8, "share of these among a crowd's candidates", low=0.0, high=1.0)

    @property
    def length_ms(self) -> int:
        return int(self.minutes * MINUTE_MS)

    def requests(self, requests: int, days: int) -> int:
        """What each event adds to a trace of so many requests and days."""
        return round(self.load * requests * self.minutes / (days * 1_440))


@dataclass(frozen=True)
class Visits:
    """Requests of all crowds in the order of time: user, ms from the trace's start, and number of the event."""

    user: SmallInts
    t_ms: Ints
    event: Ints


def draw_visits(
    rng: np.random.Generator,
    config: CrowdConfig,
    user: SmallInts,
    t_ms: Ints,
    first_ms: Ints,
    window_ms: int,
    pauses: Pauses,
) -> Visits:
    """Who comes when. `user`, `t_ms` [N]: the requests there are anyway; `first_ms` [U]: since when a user is there.

    No one comes who has a request of another kind during an event or within half an hour of it.
    """
    starts = np.sort((rng.random(config.events) * (window_ms - config.length_ms)).astype(np.int64))
    days = window_ms // 86_400_000
    parts: list[tuple[SmallInts, Ints]] = []
    for number, start in enumerate(starts):
        low, high = start - SESSION_GAP_MS, start + config.length_ms + SESSION_GAP_MS
        absent = first_ms <= start
        absent[user[np.searchsorted(t_ms, low) : np.searchsorted(t_ms, high)]] = False
        for earlier in np.flatnonzero(starts[:number] + config.length_ms > low):
            absent[parts[earlier][0]] = False
        came = rng.permutation(np.flatnonzero(absent))[: round(config.users * len(first_ms))]
        visitors, since = _crowd(rng, config, came.astype(np.int32), config.requests(len(user), days), pauses)
        parts.append((visitors, start + since))
    users, times = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(times, kind="stable")
    event = np.repeat(np.arange(config.events), [len(part[0]) for part in parts])
    return Visits(users[order], times[order], event[order])


def _crowd(
    rng: np.random.Generator, config: CrowdConfig, came: SmallInts, requests: int, pauses: Pauses
) -> tuple[SmallInts, Ints]:
    """(user, ms from the event's start) of the requests of those who `came`, each in one session within the event."""
    came = came[:requests]
    if not len(came):
        return came, np.empty(0, dtype=np.int64)
    counts = 1 + rng.multinomial(requests - len(came), np.full(len(came), 1 / len(came)))
    user = np.repeat(came, counts)
    gaps = draw_gaps(rng, np.zeros(requests), pauses)[0]
    firsts = offsets_of(counts)[:-1]
    gaps[firsts] = 0.0
    since = np.cumsum(gaps)
    since -= np.repeat(since[firsts], counts)
    seconds = since[firsts + counts - 1]
    length_s = config.length_ms / 1000
    arrive = -np.log1p(-rng.random(len(came)) * -np.expm1(-RUSH)) / RUSH * length_s
    # Who stays long comes early; only who stays longer than the event lasts has to hurry.
    arrive = np.minimum(arrive, np.maximum(length_s - seconds, 0.0))
    hurry = np.minimum(1.0, length_s / np.maximum(seconds, 1e-9))
    t_ms = (np.repeat(arrive, counts) + since * np.repeat(hurry, counts)) * 1000
    return user, np.minimum(t_ms.astype(np.int64), config.length_ms - 1)


def crowd_requests(
    rng: np.random.Generator, config: CrowdConfig, visits: Visits, lengths: Ints, tastes: Tastes, click_rate: float
) -> Draft:
    """The visits as requests of `lengths` [n] candidates: the event's own items, and others by the users' tastes."""
    own = np.minimum(rng.binomial(lengths, config.item_share), config.items // 2)
    picks = tastes.distinct(rng, visits.user, lengths)[0]
    cand = tastes.ids[picks]
    rank = rank_in_group(np.repeat(np.arange(len(lengths)), lengths))
    places = np.flatnonzero(rank < np.repeat(own, lengths))
    special = Tastes.without_favourites(config.items, tastes.exponent)
    numbers = special.distinct(rng, np.zeros(len(own), dtype=np.int64), own)[0]
    first_id = tastes.items + MAX_LAUNCHES + 1 + visits.event * config.items
    cand[places] = np.repeat(first_id, own) + numbers
    clicked = rng.random(len(cand)) < click_rate
    return Draft(visits.user, visits.t_ms, offsets_of(lengths), cand, clicked)
