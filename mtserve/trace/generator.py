"""Seeded traces whose marginals follow published figures: calibrated-synthetic, never real."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mtserve.config import Config, option
from mtserve.errors import InvalidArgument
from mtserve.trace.arrivals import kuairand_pauses, request_times
from mtserve.trace.calibration import ACTIVITY_SIGMA, HISTORY_SIGMA, KUAIRAND
from mtserve.trace.csr import cuts, offsets_of
from mtserve.trace.reshape import SESSION_GAP_MS, sessions_by_gap
from mtserve.trace.schema import CLICK, Ints, Progress, SmallInts, Trace, TraceMeta
from mtserve.trace.tastes import Tastes

MAX_ROW = 32_768  # most candidates of one request
BLOCK_REQUESTS = 1 << 17
BLOCK_BEHAVIOURS = 1 << 21
DAY_MS = 86_400_000


@dataclass(frozen=True)
class GeneratorConfig(Config):
    """Every knob of the generator; defaults are the published figures where there is one."""

    name: str = option("synthetic", "name shown in reports")
    seed: int = option(0, "seed of everything drawn", low=0, high=2**63 - 1)
    users: int = option(200, "users", low=1, high=50_000_000)
    requests: int = option(2_000, "requests of all users together", low=0, high=1_000_000_000)
    days: int = option(7, "length of the trace", low=1, high=3_650, unit="days")
    start_ms: int = option(
        1_700_006_400_000, "midnight at which the trace starts", low=0, high=10**14, unit="ms since the epoch"
    )
    activity_sigma: float = option(
        ACTIVITY_SIGMA, "sigma of the lognormal of requests per user; 0: all alike", low=0.0, high=3.0
    )
    long_gap_hours: float = option(8.0, "mean of the gaps of 2 h or more", low=2.1, high=720.0, unit="h")
    history_median: int = option(
        KUAIRAND["clicks_per_user"]["p50"],
        "median length of the histories before the trace; 0: none",
        low=0,
        high=1_000_000,
        unit="behaviours",
    )
    history_sigma: float = option(HISTORY_SIGMA, "sigma of the lognormal of history lengths", low=0.0, high=3.0)
    history_max: int = option(20_000, "longest history before the trace", low=0, high=1_000_000, unit="behaviours")
    history_days: int = option(31, "how far back histories reach", low=1, high=3_650, unit="days")
    history_activity: float = option(
        0.8, "correlation of history length and activity, both in the log", low=-1.0, high=1.0
    )
    candidates_mean: float = option(KUAIRAND["candidates_mean"], "mean candidates of a request", low=1.0, high=4096.0)
    candidates_spread: str = option(
        "geometric", "geometric, or fixed: candidates_mean of them always", choices=("geometric", "fixed")
    )
    clicks_mean: float = option(KUAIRAND["clicks_mean"], "mean clicks of a request", low=0.0, high=4096.0)
    items: int = option(100_000, "items there are", low=2, high=1_000_000_000)
    categories: int = option(50, "categories they fall into", low=1, high=1_000_000)
    popularity_exponent: float = option(1.0, "exponent of the items' Zipf law", low=0.0, high=3.0)
    taste: float = option(0.6, "share of candidates from the user's favourite categories", low=0.0, high=1.0)
    taste_lift: float = option(1.3, "how much likelier than average such a candidate is clicked", low=0.0, high=100.0)

    def validate(self) -> None:
        if self.categories > self.items:
            raise InvalidArgument(f"{self.categories} is above items = {self.items}", field="categories")
        if self.candidates_mean * 2 > self.items:
            raise InvalidArgument(
                f"{self.candidates_mean} is above half of items = {self.items}", field="candidates_mean"
            )
        if self.clicks_mean > self.candidates_mean:
            raise InvalidArgument(
                f"{self.clicks_mean} is above candidates_mean = {self.candidates_mean}", field="clicks_mean"
            )
        if self.start_ms % DAY_MS or self.start_ms < self.history_days * DAY_MS:
            raise InvalidArgument("must be a midnight (UTC) at least history_days after the epoch", field="start_ms")

    @property
    def click_rate(self) -> float:
        """Share of candidates that are clicked."""
        return self.clicks_mean / self.candidates_mean

    @property
    def click_rates(self) -> tuple[float, float]:
        """Share clicked of candidates (outside, inside) the user's favourites; the mean is `click_rate`."""
        rate, taste = self.click_rate, self.taste
        if rate == 0 or taste in (0.0, 1.0):
            return rate, rate
        inside = rate * min(self.taste_lift, 1 / rate, 1 / taste)
        # The lift may not push the others above 1 either.
        inside = max(inside, (rate - (1 - taste)) / taste)
        return (rate - taste * inside) / (1 - taste), inside


def generate(config: GeneratorConfig, progress: Progress | None = None) -> Trace:
    """A trace of exactly `config.requests` requests and `config.users` users, the same for the same config.

    progress: called with (requests done, requests in all). A user may have no request.
    """
    activity, times, taste, rows, past = (
        np.random.default_rng(child) for child in np.random.SeedSequence(config.seed).spawn(5)
    )
    activity_z = activity.standard_normal(config.users)
    weights = np.exp(config.activity_sigma * activity_z)
    counts = activity.multinomial(config.requests, weights / weights.sum())
    pauses = kuairand_pauses(config.long_gap_hours * 3600)
    user, since_ms = request_times(times, counts, config.days, pauses)
    t_ms = since_ms + config.start_ms
    tastes = Tastes.draw(taste, config.users, config.items, config.categories, config.popularity_exponent, config.taste)
    history = _histories(past, config, tastes, activity_z)
    requests = _requests(rows, config, tastes, user, progress)
    return Trace(
        user_ids=tuple(f"u{number}" for number in range(config.users)),
        **history, **requests,
        user=user, t_ms=t_ms, session=sessions_by_gap(user, t_ms, SESSION_GAP_MS), meta=_meta(config),
    )  # fmt: skip


def _meta(config: GeneratorConfig) -> TraceMeta:
    return TraceMeta(
        name=config.name,
        source="mtserve generator, fitted to published KuaiRand-27K figures",
        seed=config.seed,
        calibrated_synthetic=True,
        config=asdict(config),
    )


def _histories(
    rng: np.random.Generator,
    config: GeneratorConfig,
    tastes: Tastes,
    activity_z: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> dict[str, Any]:
    """The history columns: lognormal lengths, times spread evenly over `history_days`."""
    own = rng.standard_normal(config.users)
    mixed = config.history_activity * activity_z + np.sqrt(1 - config.history_activity**2) * own
    # Clipped before exp, which would overflow for no good reason.
    lengths = config.history_median * np.exp(np.clip(config.history_sigma * mixed, -50, 50))
    offsets = offsets_of(np.minimum(np.rint(lengths), config.history_max).astype(np.int64))
    items, t_ms = np.empty(offsets[-1], dtype=np.int64), np.empty(offsets[-1], dtype=np.int64)
    share = config.taste * config.click_rates[1] / config.click_rate if config.click_rate else config.taste
    for first, last in cuts(offsets, config.users, BLOCK_BEHAVIOURS):
        part = slice(offsets[first], offsets[last])
        user = np.repeat(np.arange(first, last), np.diff(offsets[first : last + 1]))
        items[part] = tastes.ids[tastes.pick(rng, user, share)[0]]
        t_ms[part] = _history_times(rng, offsets[first : last + 1] - offsets[first], config)
    return {
        "history_offsets": offsets,
        "history_items": items,
        "history_t_ms": t_ms,
        "history_actions": np.full(len(items), CLICK, dtype=np.int32),
    }


def _history_times(rng: np.random.Generator, offsets: Ints, config: GeneratorConfig) -> Ints:
    """Ascending times of each row, uniform over the days before the trace: normalised exponential spacings."""
    lengths = np.diff(offsets)
    row = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.concatenate([[0.0], np.cumsum(rng.exponential(1.0, len(row)))])
    total = sums[offsets[1:]] - sums[offsets[:-1]] + rng.exponential(1.0, len(lengths))
    share = (sums[1:] - sums[offsets[:-1]][row]) / total[row]
    return config.start_ms - DAY_MS * config.history_days + (share * config.history_days * DAY_MS).astype(np.int64)


def _requests(
    rng: np.random.Generator, config: GeneratorConfig, tastes: Tastes, user: SmallInts, progress: Progress | None
) -> dict[str, Any]:
    """The candidate and click columns, by blocks of requests."""
    offsets = offsets_of(_candidate_counts(rng, config, len(user)))
    cand = np.empty(offsets[-1], dtype=np.int64)
    clicked = np.empty(offsets[-1], dtype=np.bool_)
    outside, inside = config.click_rates
    for first, last in cuts(offsets, BLOCK_REQUESTS, BLOCK_BEHAVIOURS):
        part = slice(offsets[first], offsets[last])
        picks, liked = tastes.distinct(rng, user[first:last], np.diff(offsets[first : last + 1]))
        cand[part] = tastes.ids[picks]
        clicked[part] = rng.random(len(picks)) < np.where(liked, inside, outside)
        if progress is not None:
            progress(last, len(user))
    sums = offsets_of(clicked)
    return {
        "cand_offsets": offsets,
        "cand_items": cand,
        "clicked_offsets": sums[offsets],
        "clicked_items": cand[clicked],
        "clicked_actions": np.full(int(sums[-1]), CLICK, dtype=np.int32),
    }


def _candidate_counts(rng: np.random.Generator, config: GeneratorConfig, requests: int) -> Ints:
    """[requests] at least 1, at most half of the items and MAX_ROW."""
    if config.candidates_spread == "fixed" or config.candidates_mean == 1:
        return np.full(requests, round(config.candidates_mean), dtype=np.int64)
    counts = rng.geometric(1 / config.candidates_mean, requests)
    return np.minimum(counts, min(MAX_ROW, config.items // 2)).astype(np.int64)
