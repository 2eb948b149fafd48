"""Users who first appear during the trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtserve.config import Config, option
from mtserve.trace.schema import Ints


@dataclass(frozen=True)
class NewcomerConfig(Config):
    """How many come, when, and with what history."""

    share: float = option(0.0, "share of the users who first come during the trace", low=0.0, high=1.0)
    over_days: int = option(
        0,
        "days, from the trace's first on, over which they come at an even rate; 0: all",
        low=0,
        high=3_650,
        unit="days",
    )
    history: int = option(
        0,
        "median length of their histories, none longer than without this; 0: none have one",
        low=0,
        high=1_000_000,
        unit="behaviours",
    )


@dataclass(frozen=True)
class Newcomers:
    """Who is new (`new` [users]), the day each user is there from (`first_day` [users], 0 for the others)."""

    new: npt.NDArray[np.bool_]
    first_day: Ints
    most_history: Ints  # [users] behaviours a user has at most before the trace

    @classmethod
    def draw(
        cls, rng: np.random.Generator, config: NewcomerConfig, users: int, days: int, sigma: float, most: int
    ) -> Newcomers:
        """sigma: of the lognormal of their histories' lengths; most: what the others' histories may have."""
        new = rng.random(users) < config.share
        day = (rng.random(users) * (config.over_days or days)).astype(np.int64)
        lengths = config.history * np.exp(np.clip(sigma * rng.standard_normal(users), -50, 50))
        short = np.minimum(np.rint(lengths), most).astype(np.int64)
        return cls(new, np.where(new, day, 0), np.where(new, short, most))
