"""Published figures of real logs that generated traces are fitted to and compared with.

KuaiRand-27K: 31 days, 27,285 users, 322 M exposures, one request being a user's exposures
less than 1 s apart. EB-NeRD: its benchmark's impressions. Azure's LLM services: how bursty arrivals
are. What is fitted here is derived from those figures; `docs/trace.md` lists what is invented.
"""

from __future__ import annotations

from itertools import pairwise
from math import log
from typing import Any

from mtserve.errors import InvalidArgument

Z = {50: 0.0, 95: 1.6449, 99: 2.3263}
"""Standard normal quantiles by percent."""

KUAIRAND: dict[str, Any] = {
    "exposures_per_user": {"p50": 8_594, "p95": 32_591, "p99": 56_230, "max": 228_000},
    "clicks_per_user": {"p50": 3_806, "p95": 10_511, "p99": 15_195, "max": 83_260},
    "top_10_percent_share": 0.32,
    "requests_per_user_and_day": 66.0,
    "candidates_mean": 5.8,
    "clicks_mean": 2.2,
    "gap_shares": (0.093, 0.320, 0.379, 0.134, 0.039, 0.034),
    "load_peak": 1.65,
    "load_trough": 0.19,
}
EBNERD: dict[str, Any] = {
    "requests_per_user": {"p50": 16.5, "p95": 77.5},
    "candidates": {"p50": 7, "p95": 28},
    "history": {"p50": 93, "p95": 478},
    "gap_s": {"p50": 194.0, "p95": 19.3 * 3600},
}

AZURE: dict[str, dict[str, Any]] = {
    "conversation": {
        "dispersion": {"1": 1.386, "10": 3.868, "60": 16.41, "300": 61.70},
        "load_variance": {"1": 0.0697, "10": 0.0518, "60": 0.0463, "300": 0.0360},
        "gap_scv": 1.197,
        "minute_correlation": 0.810,
    },
    "code": {
        "dispersion": {"1": 13.19, "10": 71.85, "60": 166.9, "300": 151.6},
        "load_variance": {"1": 4.757, "10": 2.795, "60": 1.118, "300": 0.1994},
        "gap_scv": 173.0,
        "minute_correlation": 0.164,
    },
}
"""Arrivals of two services, as `burstiness.burst_figures` measures them over the whole trace as one block.

Derived by `scripts/burst_figures.py` from the Azure LLM inference trace 2023 (Microsoft, CC BY 4.0; Patel et al.,
"Splitwise", ISCA 2024): 19,366 and 8,819 arrivals in about 58 min of one day each.
"""
BURST_LEVELS: dict[str, tuple[tuple[float, float], ...]] = {
    "conversation": ((2.78, 0.0268), (548.0, 0.0585)),
    "code": ((3.92, 0.539), (9.56, 2.88)),
}
"""(mean seconds, variance) of the two jump processes whose product is fitted to the load variances of AZURE."""

GAP_EDGES_S = (1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0)
"""Lower edges of the gap histogram's bins, in seconds; the last bin is open."""
GAP_LABELS = ("1-10 s", "10-60 s", "1-5 min", "5-30 min", "30-120 min", ">= 2 h")

HOURLY_LOAD = (
    1.14, 0.79, 0.56, 0.38, 0.27, 0.19, 0.32, 0.58, 0.85, 1.00, 1.07, 1.13,
    1.25, 1.21, 1.10, 1.02, 1.03, 1.15, 1.35, 1.52, 1.62, 1.65, 1.49, 1.33,
)  # fmt: skip
"""Load of each hour of the day as a share of the mean: peak and trough published, the curve between invented."""


def lognormal_sigma(figures: dict[str, float]) -> float:
    """Sigma of a lognormal whose median is p50, by least squares in the log through p95 and p99."""
    above = [q for q in (95, 99) if f"p{q}" in figures]
    if not above:
        raise InvalidArgument("needs p95 or p99 beside p50", field="figures")
    logs = {q: log(figures[f"p{q}"] / figures["p50"]) for q in above}
    return sum(Z[q] * logs[q] for q in above) / sum(Z[q] ** 2 for q in above)


ACTIVITY_SIGMA = round(lognormal_sigma(KUAIRAND["exposures_per_user"]), 3)  # 0.808; puts 32% on the top tenth
HISTORY_SIGMA = round(lognormal_sigma(KUAIRAND["clicks_per_user"]), 3)  # 0.603


def bin_mean_s(low: float, high: float) -> float:
    """Mean of a log-uniform gap between `low` and `high` seconds."""
    return (high - low) / log(high / low)


BOUNDED_GAP_MEANS_S = tuple(bin_mean_s(low, high) for low, high in pairwise(GAP_EDGES_S))
"""Mean gap of each bin but the open one, in seconds."""
