"""What is in a trace: counts and marginals, beside the published figures generated ones are fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.trace.burstiness import burst_figures
from mtserve.trace.calendar import DAY_MS, HOUR_MS, is_weekend
from mtserve.trace.calibration import AZURE, EBNERD, GAP_EDGES_S, GAP_LABELS, KUAIRAND
from mtserve.trace.csr import rank_in_group
from mtserve.trace.marginals import marginals, marginals_text
from mtserve.trace.reshape import SESSION_GAP_MS, sessions_by_gap
from mtserve.trace.schema import Ints, Trace


def info(trace: Trace) -> dict[str, Any]:
    """Counts, quantiles and shares as plain numbers, ready for JSON.

    Gaps are between one user's successive requests, in seconds. `prefix_tokens` are the
    behaviours that each request's user has at that time, U features not counted: what a server
    without a cache would encode. `load_by_hour` is in shares of the mean hour, UTC; `weekend_load`
    None without a whole day of each kind. `bursts`: `burstiness.burst_figures` of the requests and of the
    starts of sessions, and the service that the generator was told to make them like.
    """
    user_requests = np.bincount(trace.user, minlength=trace.users)
    span_ms = int(trace.t_ms[-1] - trace.t_ms[0]) if trace.requests else 0
    return {
        "name": trace.meta.name,
        "source": trace.meta.source,
        "seed": trace.meta.seed,
        "calibrated_synthetic": trace.meta.calibrated_synthetic,
        "changes": dict(trace.meta.changes),
        "users": trace.users,
        "users_with_requests": int((user_requests > 0).sum()),
        "requests": trace.requests,
        "start_ms": int(trace.t_ms[0]) if trace.requests else None,
        "span_days": span_ms / (24 * HOUR_MS),
        "distinct_items": len(np.unique(np.concatenate([trace.history_items, trace.cand_items]))),
        "history": quantiles(trace.history_lengths),
        "requests_per_user": quantiles(user_requests[user_requests > 0]),
        "top_10_percent_share": _top_share(user_requests[user_requests > 0]),
        "candidates": quantiles(trace.cand_lengths),
        "clicks": quantiles(trace.clicked_lengths),
        "gap_s": _gaps(trace),
        "sessions": _sessions(trace),
        "load_by_hour": _load(trace),
        "weekend_load": _weekend_load(trace),
        "bursts": _bursts(trace),
        "prefix_tokens": quantiles(trace.prefix_lengths()),
        "candidate_tokens": len(trace.cand_items),
        "calibration": {"kuairand": KUAIRAND, "ebnerd": EBNERD, "azure": AZURE},
    }


def quantiles(values: npt.NDArray[Any]) -> dict[str, float]:
    """Count, total, mean, p50, p95, p99 and max; zeros where there are no values."""
    if not len(values):
        return dict.fromkeys(("count", "total", "mean", "p50", "p95", "p99", "max"), 0.0)
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {
        "count": float(len(values)), "total": float(values.sum()), "mean": float(values.mean()),
        "p50": p50, "p95": p95, "p99": p99, "max": float(values.max()),
    }  # fmt: skip


def _top_share(user_requests: npt.NDArray[Any]) -> float:
    """Share of requests that the most active tenth of users make."""
    if not len(user_requests):
        return 0.0
    ranked = np.sort(user_requests)[::-1]
    return float(ranked[: max(1, len(ranked) // 10)].sum() / ranked.sum())


def _gaps(trace: Trace) -> dict[str, Any]:
    order = np.argsort(trace.user, kind="stable")
    follows = rank_in_group(trace.user[order]) > 0
    gaps = np.diff(trace.t_ms[order], prepend=0)[follows] / 1000
    counts = np.histogram(gaps, bins=[0, *GAP_EDGES_S, np.inf])[0]
    shares = (counts / max(len(gaps), 1)).tolist()
    return {**quantiles(gaps), "shares": dict(zip(("< 1 s", *GAP_LABELS), shares, strict=True))}


def _sessions(trace: Trace) -> dict[str, float]:
    """Sessions as the trace numbers them (0 where it does not), and as pauses of 30 min draw them."""
    declared = np.unique(np.stack([trace.user.astype(np.int64), trace.session]), axis=1).shape[1]
    by_gap = int(sessions_by_gap(trace.user, trace.t_ms, SESSION_GAP_MS).max(initial=0))
    return {
        "declared": declared if trace.session.any() else 0,
        "by_gap": by_gap,
        "requests_per_session": trace.requests / max(by_gap, 1),
    }


def _load(trace: Trace) -> dict[str, Any]:
    hours = np.bincount(trace.t_ms // HOUR_MS % 24, minlength=24)
    shares = (hours * 24 / max(trace.requests, 1)).tolist()
    return {"shares": shares, "peak": max(shares), "trough": min(shares)}


def _weekend_load(trace: Trace) -> float | None:
    """Mean requests of a weekend day over those of a weekday, UTC; the first and the last day may be cut: not counted."""
    if not trace.requests:
        return None
    days = trace.t_ms // DAY_MS
    first = int(days[0]) + 1
    counts = np.bincount(days - days[0], minlength=1)[1:-1]
    weekend = is_weekend(first + np.arange(len(counts)))
    if not counts[weekend].any() or not counts[~weekend].any():
        return None
    return float(counts[weekend].mean() / counts[~weekend].mean())


def session_starts_ms(trace: Trace) -> Ints:
    """Ascending times at which sessions begin, drawn by pauses of 30 min."""
    session = sessions_by_gap(trace.user, trace.t_ms, SESSION_GAP_MS)
    return np.sort(trace.t_ms[np.unique(session, return_index=True)[1]])


def _bursts(trace: Trace) -> dict[str, Any]:
    like = trace.meta.config.get("bursts.like", "none") if trace.meta.calibrated_synthetic else "none"
    return {
        "like": like if like in AZURE else None,
        "requests": burst_figures(trace.t_ms / 1000),
        "sessions": burst_figures(session_starts_ms(trace) / 1000),
    }


def info_text(facts: dict[str, Any]) -> str:
    """`info` as a table for people, each figure beside the published one and how far it is from it."""
    kind = "calibrated-synthetic" if facts["calibrated_synthetic"] else "as recorded"
    lines = [
        f"{facts['name']}: {kind}" + (f", seed {facts['seed']}" if facts["seed"] is not None else ""),
        *([f"  source: {facts['source']}"] if facts["source"] else []),
        f"  {facts['users']:,} users ({facts['users_with_requests']:,} with requests), {facts['requests']:,} requests, "
        f"{facts['span_days']:.1f} days, {facts['distinct_items']:,} items",
        f"  {facts['sessions']['by_gap']:,} sessions by pauses of 30 min, {facts['sessions']['declared']:,} declared",
        f"  {facts['prefix_tokens']['total']:,.0f} prefix tokens and {facts['candidate_tokens']:,} candidates over all "
        "requests",
        *(f"  changed: {name} {count:,}" for name, count in facts["changes"].items()),
        "",
        *marginals_text(marginals(facts)),
    ]
    return "\n".join(lines)
