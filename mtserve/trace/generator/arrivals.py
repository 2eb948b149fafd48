"""When generated users ask: how often, with which pauses, at which hours of the day."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mtserve.trace.calibration import BOUNDED_GAP_MEANS_S, GAP_EDGES_S, KUAIRAND
from mtserve.trace.csr import offsets_of, rank_in_group
from mtserve.trace.generator.clock import Clock
from mtserve.trace.schema import Floats, Ints

Bools: TypeAlias = npt.NDArray[np.bool_]

SHORT_BINS = 4  # the bins below 30 min; the two above them end a session
PAUSE_CHOICES = 16


@dataclass(frozen=True)
class Pauses:
    """Shares of the gap histogram's six bins and the mean of the open one, in seconds."""

    shares: Floats
    long_mean_s: float

    @property
    def session_gaps_s(self) -> float:
        """Mean of a gap below 30 min."""
        short = self.shares[:SHORT_BINS]
        return float(short @ BOUNDED_GAP_MEANS_S[:SHORT_BINS] / short.sum())

    @property
    def breaks_s(self) -> float:
        """Mean of a gap of 30 min or more."""
        breaks = self.shares[SHORT_BINS:]
        return float(breaks @ (BOUNDED_GAP_MEANS_S[-1], self.long_mean_s) / breaks.sum())


def kuairand_pauses(long_mean_s: float) -> Pauses:
    shares = np.array(KUAIRAND["gap_shares"])
    return Pauses(shares / shares.sum(), long_mean_s)


def break_scales(counts: Ints, window_s: Floats, pauses: Pauses, gap_multiples: Floats) -> Floats:
    """[U] factors on each user's share of breaks (gaps of 30 min or more), of users with `window_s` [U] seconds each.

    Someone with many requests must have fewer breaks for them to fit the window, so others
    get more, until the breaks of all users together have their published share again.
    """
    share = float(pauses.shares[SHORT_BINS:].sum())
    spare_s = window_s / np.maximum(counts, 1) - pauses.session_gaps_s * gap_multiples * (1 - share)
    # Replacing one short gap by a break adds the difference of the two means.
    caps = np.clip(spare_s / (share * pauses.breaks_s), 0, 0.9 / share)
    low, high = 0.0, 0.9 / share
    for _ in range(50):
        level = (low + high) / 2
        enough = np.minimum(level, caps) @ counts >= counts.sum()
        low, high = (low, level) if enough else (level, high)
    return np.minimum(high, caps)


def draw_gaps(rng: np.random.Generator, scales: Floats, pauses: Pauses) -> tuple[Floats, Bools, Bools]:
    """Seconds [N] of the gap before each request; which gaps are breaks, and which of those long.

    `scales` [N] multiplies the share of the breaks, whose lengths are drawn later.
    """
    share = pauses.shares[SHORT_BINS:].sum()
    draw = rng.random(len(scales))
    breaks = draw < scales * share
    # The same draw, stretched over what it fell in, picks the bin: one uniform a gap.
    long = breaks & (draw >= scales * pauses.shares[SHORT_BINS])
    within = np.clip((draw - scales * share) / (1 - scales * share), 0, 1)
    ends = np.cumsum(pauses.shares[:SHORT_BINS] / pauses.shares[:SHORT_BINS].sum())[:-1]
    bins = np.searchsorted(ends, within, side="right")
    lows, ratios = np.array(GAP_EDGES_S[:SHORT_BINS]), np.diff(np.log(GAP_EDGES_S))
    return lows[bins] * np.exp(rng.random(len(scales)) * ratios[bins]), breaks, long


def stretch_gaps(gaps: Floats, multiples: Floats) -> Floats:
    """Gaps inside sessions [N] times `multiples` [N], none of which then ends a session or falls below 1 s."""
    longest = np.nextafter(GAP_EDGES_S[SHORT_BINS], 0)
    return np.where(multiples == 1, gaps, np.clip(gaps * multiples, GAP_EDGES_S[0], longest))


def place_sessions(
    rng: np.random.Generator, owner: Ints, seconds: Floats, long: Bools, clock: Clock, long_mean_s: float
) -> Floats:
    """[sessions] start of each session, in seconds from its owner's first midnight.

    owner: user of each session, never decreasing; seconds: how long it lasts; long: whether a
    pause of 2 h or more precedes it. A user keeps as many long breaks as `long` has, but takes
    them when the load is low; and of several drawn lengths one is taken by the load of the hour
    at which the next session would start. Bursts move it within that hour, the break staying
    as short or long as it was.
    """
    starts = np.empty(len(owner))
    long_left = np.bincount(owner, weights=long) if len(owner) else np.empty(0)
    breaks_left = np.bincount(owner) - 1 if len(owner) else np.empty(0)
    rank = rank_in_group(owner)
    by_rank = np.argsort(rank, kind="stable")
    ends = offsets_of(np.bincount(rank))
    for number in range(len(ends) - 1):
        rows = by_rank[ends[number] : ends[number + 1]]
        users = owner[rows]
        if number == 0:
            first = clock.choose(rng, rng.random((len(rows), PAUSE_CHOICES)) * clock.arrives_s[users][:, None], users)
            span_s = clock.attendance.span_s[users]
            starts[rows] = clock.move_starts(first, users, np.zeros(len(rows)), span_s)
            continue
        idle_from = starts[rows - 1] + seconds[rows - 1]
        urge = long_left[users] * clock.urge[clock.hours(idle_from, users)]
        others = breaks_left[users] - long_left[users]
        is_long = rng.random(len(rows)) * (urge + others) < urge
        long_left[users] -= is_long
        breaks_left[users] -= 1
        after = clock.choose(rng, idle_from[:, None] + _break_choices(rng, is_long, long_mean_s), users)
        low, high = GAP_EDGES_S[SHORT_BINS:]
        least, most = np.where(is_long, high, low), np.where(is_long, np.inf, high)
        starts[rows] = clock.move_starts(after, users, idle_from + least, idle_from + most)
    return starts


def _break_choices(rng: np.random.Generator, is_long: Bools, long_mean_s: float) -> Floats:
    """[n, PAUSE_CHOICES] seconds: log-uniform over 30 to 120 min, or 2 h and an exponential beyond."""
    shape = (len(is_long), PAUSE_CHOICES)
    low, high = GAP_EDGES_S[SHORT_BINS:]
    return np.where(
        is_long[:, None],
        high + rng.exponential(long_mean_s - high, shape),
        low * np.exp(rng.random(shape) * np.log(high / low)),
    )


def request_times(
    rng: np.random.Generator, counts: Ints, clock: Clock, pauses: Pauses, gap_multiples: Floats
) -> tuple[npt.NDArray[np.int32], Ints]:
    """(user [N], ms since the trace's start [N]) of all requests, in time order; counts[u] requests of user u.

    gap_multiples [U]: of each user's gaps inside sessions.
    """
    user = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    scales = break_scales(counts, clock.attendance.span_s, pauses, gap_multiples)
    gaps, breaks, long = draw_gaps(rng, scales[user], pauses)
    gaps = stretch_gaps(gaps, gap_multiples[user])
    firsts = rank_in_group(user) == 0
    opens = np.flatnonzero(firsts | breaks)
    gaps[opens] = 0.0
    lengths = np.diff(opens, append=len(user))
    since = np.cumsum(gaps)
    since -= np.repeat(since[opens], lengths)
    seconds = since[opens + lengths - 1]
    precede = (long & ~firsts)[opens]
    starts = place_sessions(rng, user[opens].astype(np.int64), seconds, precede, clock, pauses.long_mean_s)
    t_s = clock.move_requests(clock.attendance.since(np.repeat(starts, lengths), since, user))
    t_ms = (t_s * 1000).astype(np.int64)
    order = np.argsort(t_ms, kind="stable")
    return user[order], t_ms[order]
