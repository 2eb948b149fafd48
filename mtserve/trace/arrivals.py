"""When generated users ask: how often, with which pauses, at which hours of the day."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mtserve.trace.calibration import BOUNDED_GAP_MEANS_S, GAP_EDGES_S, HOURLY_LOAD, KUAIRAND
from mtserve.trace.csr import offsets_of, rank_in_group
from mtserve.trace.schema import Ints

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

DAY_S = 86_400.0
SHORT_BINS = 4  # the bins below 30 min; the two above them end a session
PAUSE_CHOICES = 16
# By the hour at which a session may start. Found by iterating to HOURLY_LOAD at the published
# density (66 requests per user and day); the load lags the starts by a session's length.
START_WEIGHTS = np.array(
    [0.092, 0.012, 0.005, 0.002, 0.002, 0.001, 0.482, 1.578, 2.276, 2.056, 1.720, 1.663,
     1.773, 1.029, 0.721, 0.770, 1.171, 1.790, 2.202, 1.909, 1.369, 0.841, 0.345, 0.190]
)  # fmt: skip
LONG_BREAK_URGE = np.array(HOURLY_LOAD) ** -2.0


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


def break_scales(counts: Ints, window_s: float, pauses: Pauses) -> Floats:
    """[U] factors on each user's share of breaks (gaps of 30 min or more).

    Someone with many requests must have fewer breaks for them to fit the window, so others
    get more, until the breaks of all users together have their published share again.
    """
    share = float(pauses.shares[SHORT_BINS:].sum())
    spare_s = window_s / np.maximum(counts, 1) - pauses.session_gaps_s * (1 - share)
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


def place_sessions(
    rng: np.random.Generator, owner: Ints, seconds: Floats, long: Bools, window_s: float, long_mean_s: float
) -> Floats:
    """[sessions] start of each session, in seconds from the trace's first midnight.

    owner: user of each session, never decreasing; seconds: how long it lasts; long: whether a
    pause of 2 h or more precedes it. A user keeps as many long breaks as `long` has, but takes
    them when the load is low; and of several drawn lengths one is taken by the load of the hour
    at which the next session would start.
    """
    starts = np.empty(len(owner))
    long_left = np.bincount(owner, weights=long) if len(owner) else np.empty(0)
    breaks_left = np.bincount(owner) - 1 if len(owner) else np.empty(0)
    rank = rank_in_group(owner)
    by_rank = np.argsort(rank, kind="stable")
    ends = offsets_of(np.bincount(rank))
    for number in range(len(ends) - 1):
        rows = by_rank[ends[number] : ends[number + 1]]
        if number == 0:
            starts[rows] = _choose(rng, rng.random((len(rows), PAUSE_CHOICES)) * window_s)
            continue
        idle_from, users = starts[rows - 1] + seconds[rows - 1], owner[rows]
        urge = long_left[users] * LONG_BREAK_URGE[_hours(idle_from)]
        others = breaks_left[users] - long_left[users]
        is_long = rng.random(len(rows)) * (urge + others) < urge
        long_left[users] -= is_long
        breaks_left[users] -= 1
        starts[rows] = _choose(rng, idle_from[:, None] + _break_choices(rng, is_long, long_mean_s))
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


def _hours(seconds: Floats) -> Ints:
    return (seconds % DAY_S // 3600).astype(np.int64)


def _choose(rng: np.random.Generator, choices: Floats) -> Floats:
    """One entry of each row, its chance being the weight of its hour of the day."""
    sums = np.cumsum(START_WEIGHTS[_hours(choices)], axis=1)
    picks = (sums < rng.random((len(choices), 1)) * sums[:, -1:]).sum(axis=1)
    return choices[np.arange(len(choices)), np.minimum(picks, choices.shape[1] - 1)]


def request_times(
    rng: np.random.Generator, counts: Ints, days: int, pauses: Pauses
) -> tuple[npt.NDArray[np.int32], Ints]:
    """(user [N], ms since the trace's start [N]) of all requests, in time order; counts[u] requests of user u.

    Time is a ring of `days` days: who passes the end goes on at the start, at the same hour of
    the day, which keeps the daily load and all but one of a user's gaps as they were drawn.
    """
    window_s = days * DAY_S
    user = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    gaps, breaks, long = draw_gaps(rng, break_scales(counts, window_s, pauses)[user], pauses)
    firsts = rank_in_group(user) == 0
    opens = np.flatnonzero(firsts | breaks)
    gaps[opens] = 0.0
    lengths = np.diff(opens, append=len(user))
    since = np.cumsum(gaps)
    since -= np.repeat(since[opens], lengths)
    seconds = since[opens + lengths - 1]
    precede = (long & ~firsts)[opens]
    starts = place_sessions(rng, user[opens].astype(np.int64), seconds, precede, window_s, pauses.long_mean_s)
    t_ms = ((np.repeat(starts, lengths) + since) % window_s * 1000).astype(np.int64)
    order = np.argsort(t_ms, kind="stable")
    return user[order], t_ms[order]
