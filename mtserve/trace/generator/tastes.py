"""What generated users see and click: long-tailed items, and a few favourite categories each.

Item number r (0 is the most popular) belongs to category r % categories. A pick is drawn
from the user's favourites with probability `taste`, otherwise from all items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtserve.trace.csr import offsets_of
from mtserve.trace.schema import Floats, Ints

FAVOURITE_ENDS = np.array([0.5, 0.8, 1.0])
"""Cumulated shares of a user's three favourite categories."""
REDRAWS = 3


def zipf_ranks(rng: np.random.Generator, count: int | tuple[int, ...], items: int, exponent: float) -> Ints:
    """Ranks 0..items-1, rank r drawn about (r + 1)**-exponent: the inverse of the continuous law, floored."""
    draw = rng.random(count)
    if abs(exponent - 1) < 1e-9:
        ranks = np.power(items + 1.0, draw)
    else:
        power = 1 - exponent
        ranks = np.power(1 + draw * (np.power(items + 1.0, power) - 1), 1 / power)
    return np.minimum(ranks.astype(np.int64) - 1, items - 1)


def click_rates(rate: float, taste: float, lift: float) -> tuple[float, float]:
    """Share clicked of candidates (outside, inside) the user's favourites; the mean over both is `rate`."""
    if rate == 0 or taste in (0.0, 1.0):
        return rate, rate
    inside = rate * min(lift, 1 / rate, 1 / taste)
    # The lift may not push the others above 1 either.
    inside = max(inside, (rate - (1 - taste)) / taste)
    return (rate - taste * inside) / (1 - taste), inside


@dataclass(frozen=True)
class Tastes:
    """Whose favourites are which; `favourites`: int64 [users, 3] category numbers."""

    items: int
    categories: int
    exponent: float
    taste: Floats  # [users] share of each user's candidates from the favourites
    favourites: Ints
    ids: Ints  # [items] id of each item number, so that ids do not tell popularity

    @classmethod
    def draw(
        cls, rng: np.random.Generator, users: int, items: int, categories: int, exponent: float, taste: Floats
    ) -> Tastes:
        favourites = rng.integers(0, categories, (users, len(FAVOURITE_ENDS)))
        return cls(items, categories, exponent, taste, favourites, rng.permutation(items) + 1)

    @classmethod
    def without_favourites(cls, items: int, exponent: float) -> Tastes:
        """One user, number 0, who likes all alike; ids are the item numbers."""
        none = np.zeros((1, len(FAVOURITE_ENDS)), dtype=np.int64)
        return cls(items, 1, exponent, np.zeros(1), none, np.arange(items))

    def pick(
        self, rng: np.random.Generator, user: npt.NDArray[np.integer], taste: Floats
    ) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Item numbers [n], one for each entry of `user`, and whether each came from the user's favourites.

        taste [users]: each user's chance of that.
        """
        liked = rng.random(len(user)) < taste[user]
        picks = np.empty(len(user), dtype=np.int64)
        picks[~liked] = zipf_ranks(rng, int((~liked).sum()), self.items, self.exponent)
        fans = user[liked]
        which = np.searchsorted(FAVOURITE_ENDS, rng.random(len(fans)), side="right")
        category = self.favourites[fans, which]
        within = zipf_ranks(rng, len(fans), self.items // self.categories, self.exponent)
        picks[liked] = within * self.categories + category
        return picks, liked

    def distinct(
        self, rng: np.random.Generator, user: npt.NDArray[np.integer], lengths: Ints
    ) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """As `pick`, lengths[i] items for user[i], no item twice in one row. Every length is at most items / 2."""
        row = np.repeat(np.arange(len(lengths)), lengths)
        picks, liked = self.pick(rng, user[row], self.taste)
        again, redraws = repeats(row, picks, self.items), 0
        while len(again):
            if redraws < REDRAWS:
                picks[again], liked[again] = self.pick(rng, user[row[again]], self.taste)
            else:
                picks[again] = (picks[again] + 1) % self.items
            redraws += 1
            # Only rows that had a repeat can have one now.
            touched = np.flatnonzero(np.bincount(row[again], minlength=len(lengths)))
            rows = _members(lengths, touched)
            again = rows[repeats(row[rows], picks[rows], self.items)]
        return picks, liked


def _members(lengths: Ints, rows: Ints) -> Ints:
    starts = offsets_of(lengths)[:-1][rows]
    counts = lengths[rows]
    return np.repeat(starts - offsets_of(counts)[:-1], counts) + np.arange(counts.sum())


def repeats(row: Ints, picks: Ints, items: int) -> Ints:
    """Positions of every pick (below `items`) that an earlier one of its row equals."""
    key = row * items + picks
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(key[order][1:] == key[order][:-1]) + 1
    return order[same]
