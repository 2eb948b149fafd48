"""On which days of the trace each user is there: time is a ring of these days.

Who passes the end of the last one goes on at the first one, at the same hour of the day, which keeps the
daily load and all but one of a user's gaps as they were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtserve.trace.calendar import DAY_MS, DAY_S, is_weekend
from mtserve.trace.generator.newcomers import Newcomers
from mtserve.trace.schema import Floats

MAX_USER_DAYS = 1 << 30  # entries of the table of days: 2 GiB
BLOCK_USERS = 1 << 16


@dataclass(frozen=True)
class Attendance:
    """`first_s`, `span_s` [users]: the user's first day, and the days' sum; all in seconds.

    `days` int16 [users, days of the trace]: each user's days in order, where they are not all from the first one on.
    """

    window_s: float
    first_s: Floats
    span_s: Floats
    days: npt.NDArray[np.int16] | None = None

    @classmethod
    def draw(
        cls, rng: np.random.Generator, weekend: float, start_ms: int, days: int, newcomers: Newcomers
    ) -> Attendance:
        """Who is away when: on weekend days if `weekend` is below 1, else on weekdays, as many as make that ratio."""
        first = newcomers.first_day.astype(np.float64)
        if weekend == 1:
            return cls(days * DAY_S, first * DAY_S, (days - first) * DAY_S)
        weekends = is_weekend(start_ms // DAY_MS + np.arange(days))
        chance = np.where(weekends, min(weekend, 1.0), min(1 / weekend, 1.0))
        table = np.empty((len(first), days), dtype=np.int16)
        counts = np.empty(len(first))
        for start in range(0, len(first), BLOCK_USERS):
            rows = slice(start, start + BLOCK_USERS)
            since = np.arange(days) >= first[rows, None]
            there = since & (rng.random(since.shape) < chance)
            # Who would be away all the time is there all the time.
            there |= since & ~there.any(axis=1, keepdims=True)
            table[rows] = np.argsort(~there, axis=1, kind="stable")
            counts[rows] = there.sum(axis=1)
        return cls(days * DAY_S, first * DAY_S, counts * DAY_S, table)

    def moments(self, t: Floats, user: npt.NDArray[np.integer]) -> Floats:
        """Seconds from the trace's start of moments `t` [n] on the users' rings."""
        along = t % self.span_s[user]
        if self.days is None:
            return self.first_s[user] + along
        return self.days[user, (along // DAY_S).astype(np.int64)] * DAY_S + along % DAY_S

    def since(self, starts: Floats, seconds: Floats, user: npt.NDArray[np.integer]) -> Floats:
        """Seconds from the trace's start of what comes `seconds` [n] after `starts` [n] on the users' rings."""
        if self.days is None:
            return self.moments(starts + seconds, user)
        # A session that began on a day when the user is there goes on past its midnight.
        return (self.moments(starts, user) + seconds) % self.window_s
