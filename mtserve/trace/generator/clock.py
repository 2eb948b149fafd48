"""At which hours generated users like to come, and in which moments of an hour they all do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtserve.config import Config, option
from mtserve.trace.calendar import DAY_S, HOUR_S
from mtserve.trace.calibration import HOURLY_LOAD
from mtserve.trace.generator.attendance import Attendance
from mtserve.trace.generator.bursts import BurstLoad
from mtserve.trace.generator.newcomers import Newcomers
from mtserve.trace.schema import Floats, Ints

# By the hour at which a session may start. Found by iterating to HOURLY_LOAD at the published
# density (66 requests per user and day); the load lags the starts by a session's length.
START_WEIGHTS = np.array(
    [0.092, 0.012, 0.005, 0.002, 0.002, 0.001, 0.482, 1.578, 2.276, 2.056, 1.720, 1.663,
     1.773, 1.029, 0.721, 0.770, 1.171, 1.790, 2.202, 1.909, 1.369, 0.841, 0.345, 0.190]
)  # fmt: skip
LONG_BREAK_URGE = np.array(HOURLY_LOAD) ** -2.0


@dataclass(frozen=True)
class WeekConfig(Config):
    """Day and night, weekdays and weekends."""

    night: float = option(
        1.0, "strength of the daily curve: its logarithm is multiplied; 0: flat, 1: as published", low=0.0, high=2.0
    )
    weekend: float = option(1.0, "load of a Saturday or Sunday (UTC) as a multiple of a weekday's", low=0.05, high=20.0)


@dataclass(frozen=True)
class Clock:
    """Times on the rings of `attendance`, in seconds.

    Each user's first session starts within `arrives_s` [users] of the ring's start; all habits of the
    hour are `later_s` [users] later than others'.
    """

    attendance: Attendance
    weights: Floats  # [24] by the hour at which a session may start
    urge: Floats  # [24] how much likelier a long break begins in that hour
    arrives_s: Floats
    later_s: Floats
    bursts: BurstLoad | None
    moves: str  # what the bursts move, `BurstConfig.moves`

    @classmethod
    def of(
        cls,
        config: WeekConfig,
        attendance: Attendance,
        newcomers: Newcomers,
        later_h: Floats,
        bursts: BurstLoad | None,
        moves: str,
    ) -> Clock:
        arrives_s = np.where(newcomers.new, DAY_S, attendance.span_s)
        weights, urge = START_WEIGHTS**config.night, LONG_BREAK_URGE**config.night
        return cls(attendance, weights, urge, arrives_s, later_h * HOUR_S, bursts, moves)

    def hours(self, t: Floats, user: npt.NDArray[np.integer]) -> Ints:
        """The hour of the user's own day, 0 to 23."""
        return ((t - self.later_s[user]) % DAY_S // HOUR_S).astype(np.int64)

    def choose(self, rng: np.random.Generator, choices: Floats, user: Ints) -> Floats:
        """One entry of each row of `choices` [n, k], its chance being the weight of its hour."""
        sums = np.cumsum(self.weights[self.hours(choices, user[:, None])], axis=1)
        picks = (sums < rng.random((len(choices), 1)) * sums[:, -1:]).sum(axis=1)
        return choices[np.arange(len(choices)), np.minimum(picks, choices.shape[1] - 1)]

    def move_starts(self, t: Floats, user: Ints, after: Floats, before: Floats) -> Floats:
        """Starts of sessions `t` [n] moved by bursts, each within its hour and between `after` and `before` [n]."""
        if self.bursts is None or self.moves != "sessions":
            return t
        there = self.attendance.moments(t, user)
        lap = t - there
        hour = there // HOUR_S * HOUR_S
        low, high = np.maximum(hour, after - lap), np.minimum(hour + HOUR_S, before - lap)
        return self.bursts.move(low, there, high) + lap

    def move_requests(self, t: Floats) -> Floats:
        """Requests at `t` [n] seconds from the trace's start, moved by bursts within their hours."""
        if self.bursts is None or self.moves != "requests":
            return t
        hour = t // HOUR_S * HOUR_S
        return self.bursts.move(hour, t, hour + HOUR_S)
