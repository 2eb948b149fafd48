"""Bursts over seconds to minutes: a load that jumps, and the moments to which it moves arrivals.

The load is the product of two independent Markov jump processes: each keeps its level for an
exponential time of mean T and then draws a new one from a gamma law of mean 1 and variance v, which
makes its autocovariance v exp(-t / T). Arrivals under such a load are a doubly stochastic Poisson
process (Cox, 1955). The parameters are fitted to published arrivals (`calibration.BURSTS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtserve.config import Config, option
from mtserve.trace.calibration import BURST_LEVELS
from mtserve.trace.schema import Floats

MAX_DAYS = 400  # the fastest windows of so many days still fit memory


@dataclass(frozen=True)
class BurstConfig(Config):
    """Which bursts there are, and what they move."""

    like: str = option(
        "none",
        "whose bursts: those of Azure's conversation or code service, 2023",
        choices=("none", *BURST_LEVELS),
    )
    moves: str = option(
        "sessions",
        "what they move within its hour: starts of sessions, whose gaps stay as they are; or every request, which "
        "makes gaps shorter in bursts and longer between",
        choices=("sessions", "requests"),
    )
    strength: float = option(1.0, "multiple of the variance of their load; 0: no bursts", low=0.0, high=10.0)

    @property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """(mean seconds T, variance v) of each jump process; none without bursts."""
        if self.like == "none" or self.strength == 0:
            return ()
        return tuple((mean_s, variance * self.strength) for mean_s, variance in BURST_LEVELS[self.like])


def load_variance(levels: Sequence[tuple[float, float]], window_s: Floats) -> Floats:
    """Variance of the load's mean over windows of `window_s`, the load's own mean being 1.

    A process with autocovariance v exp(-t / T) has v g(w / T), g(x) = 2 (x - 1 + exp(-x)) / x^2; the product's
    autocovariance is the sum of both and of their product.
    """
    terms = list(levels)
    if len(levels) == 2:
        (fast, fast_variance), (slow, slow_variance) = levels
        terms.append((1 / (1 / fast + 1 / slow), fast_variance * slow_variance))
    total = np.zeros_like(window_s)
    for mean_s, variance in terms:
        x = window_s / mean_s
        total += variance * 2 * (x - 1 + np.exp(-x)) / x**2
    return total


@dataclass(frozen=True)
class BurstLoad:
    """The integral of a drawn load: `sums` [n] at `edges` [n], in seconds from the trace's start, linear between."""

    edges: Floats
    sums: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, levels: Sequence[tuple[float, float]], window_s: float) -> BurstLoad:
        drawn = [_windows(rng, mean_s, variance, window_s) for mean_s, variance in levels]
        edges = np.unique(np.concatenate([ends for ends, _ in drawn]))
        loads = np.ones(len(edges))
        for ends, values in drawn:
            loads *= values[np.searchsorted(ends, edges)]
        return cls(
            np.concatenate([[0.0], edges]), np.concatenate([[0.0], np.cumsum(loads * np.diff(edges, prepend=0.0))])
        )

    def move(self, low: Floats, t: Floats, high: Floats) -> Floats:
        """Where arrivals at `t` [n], evenly spread over low..high (within one hour), come under this load.

        Their order and those limits are kept: the hours keep their load, and only what happens inside them changes.
        """
        first, last = self._sum(low), self._sum(high)
        share = (t - low) / np.maximum(high - low, 1e-9)
        return np.clip(np.interp(first + share * (last - first), self.sums, self.edges), low, high)

    def _sum(self, t: Floats) -> Floats:
        return np.interp(t, self.edges, self.sums)


def _windows(rng: np.random.Generator, mean_s: float, variance: float, window_s: float) -> tuple[Floats, Floats]:
    """(ends, level) of windows that cover 0..window_s; the last one ends there."""
    count = int(window_s / mean_s + 6 * np.sqrt(window_s / mean_s)) + 16
    ends = np.cumsum(rng.exponential(mean_s, count))
    while ends[-1] < window_s:
        ends = np.concatenate([ends, ends[-1] + np.cumsum(rng.exponential(mean_s, count))])
    ends = ends[: np.searchsorted(ends, window_s) + 1]
    ends[-1] = window_s
    return ends, rng.gamma(1 / variance, variance, len(ends))
