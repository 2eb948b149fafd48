"""The generator: determinism, its marginals against the published figures, its knobs; and `info`."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from trace_samples import sample_trace

from mtserve.errors import InvalidArgument
from mtserve.trace.calibration import ACTIVITY_SIGMA, GAP_LABELS, HISTORY_SIGMA, HOURLY_LOAD, KUAIRAND
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.info import info, info_text
from mtserve.trace.schema import Trace

DAYS = 31
USERS = 150
PUBLISHED_REQUESTS = round(USERS * DAYS * KUAIRAND["requests_per_user_and_day"])


@pytest.fixture(scope="module")
def dense() -> Trace:
    """As many requests per user and day as were published."""
    return generate(GeneratorConfig(users=USERS, requests=PUBLISHED_REQUESTS, days=DAYS, history_median=0))


@pytest.fixture(scope="module")
def facts(dense: Trace) -> dict[str, Any]:
    return info(dense)


def test_same_seed_same_trace() -> None:
    config = GeneratorConfig(users=20, requests=500, seed=4, history_median=10)
    assert generate(config) == generate(config)
    other = generate(GeneratorConfig(users=20, requests=500, seed=5, history_median=10))
    assert not np.array_equal(generate(config).t_ms, other.t_ms)


@pytest.mark.parametrize(("users", "requests"), [(1, 0), (1, 1), (7, 3), (50, 2_000)])
def test_counts_are_exact(users: int, requests: int) -> None:
    trace = generate(GeneratorConfig(users=users, requests=requests, history_median=3))
    assert (trace.users, trace.requests) == (users, requests)
    assert trace.meta.calibrated_synthetic
    assert trace.meta.config["users"] == users


def test_gap_shares_are_the_published_ones(facts: dict[str, Any]) -> None:
    for label, published in zip(GAP_LABELS, KUAIRAND["gap_shares"], strict=True):
        assert facts["gap_s"]["shares"][label] == pytest.approx(published, abs=0.006), label
    assert facts["gap_s"]["shares"]["< 1 s"] < 0.001


def test_gap_shares_hold_when_users_ask_less() -> None:
    shares = info(generate(GeneratorConfig(users=500, requests=50_000, history_median=0)))["gap_s"]["shares"]
    for label, published in zip(GAP_LABELS, KUAIRAND["gap_shares"], strict=True):
        assert shares[label] == pytest.approx(published, abs=0.01), label


def test_daily_load_has_the_published_peak_and_trough(facts: dict[str, Any]) -> None:
    load = facts["load_by_hour"]
    assert load["peak"] == pytest.approx(KUAIRAND["load_peak"], abs=0.15)
    assert load["trough"] == pytest.approx(KUAIRAND["load_trough"], abs=0.08)
    assert np.corrcoef(load["shares"], HOURLY_LOAD)[0, 1] > 0.97


def test_requests_hold_the_published_items_and_clicks(facts: dict[str, Any]) -> None:
    assert facts["candidates"]["mean"] == pytest.approx(KUAIRAND["candidates_mean"], rel=0.01)
    assert facts["clicks"]["mean"] == pytest.approx(KUAIRAND["clicks_mean"], rel=0.01)


def test_activity_follows_the_published_quantiles() -> None:
    facts = info(
        generate(GeneratorConfig(users=5_000, requests=250_000, history_median=0, candidates_mean=1.0, clicks_mean=0.4))
    )
    per_user, published = facts["requests_per_user"], KUAIRAND["exposures_per_user"]
    for q in ("p95", "p99"):
        assert per_user[q] / per_user["p50"] == pytest.approx(published[q] / published["p50"], rel=0.12)
    assert facts["top_10_percent_share"] == pytest.approx(KUAIRAND["top_10_percent_share"], abs=0.015)


def test_history_lengths_follow_the_published_quantiles() -> None:
    published = KUAIRAND["clicks_per_user"]
    assert GeneratorConfig().history_median == published["p50"]
    # A tenth of the lengths, for speed: the law scales with its median.
    history = info(generate(GeneratorConfig(users=5_000, requests=0, history_median=published["p50"] // 10)))["history"]
    for q in ("p50", "p95", "p99"):
        assert history[q] * 10 == pytest.approx(published[q], rel=0.08)


def test_histories_stop_at_their_limit() -> None:
    trace = generate(GeneratorConfig(users=200, requests=0, history_median=50, history_max=60))
    assert trace.history_lengths.max() == 60
    assert trace.history_t_ms.max() < GeneratorConfig().start_ms


def test_fitted_sigmas_are_what_the_documents_say() -> None:
    assert (ACTIVITY_SIGMA, HISTORY_SIGMA) == (0.808, 0.603)
    assert (max(HOURLY_LOAD), min(HOURLY_LOAD)) == (KUAIRAND["load_peak"], KUAIRAND["load_trough"])
    assert sum(HOURLY_LOAD) == pytest.approx(24)


def test_candidates_are_distinct_within_a_request() -> None:
    for config in (
        GeneratorConfig(users=5, requests=300, items=12, categories=3, history_median=0),
        GeneratorConfig(users=5, requests=50, items=1024, candidates_mean=512.0, candidates_spread="fixed"),
    ):
        trace = generate(config)
        for request in trace.iter_requests():
            assert len(set(request.cand.tolist())) == len(request.cand)
            assert set(request.clicked.tolist()) <= set(request.cand.tolist())
            assert 1 <= request.cand.min() <= request.cand.max() <= config.items
    assert (trace.cand_lengths == 512).all()


def test_popularity_is_long_tailed(dense: Trace) -> None:
    counts = np.sort(np.bincount(dense.cand_items))[::-1]
    assert counts[: len(counts) // 100].sum() > 0.4 * counts.sum()


def test_users_clicks_are_alike_in_time_and_differ_from_others(dense: Trace) -> None:
    user = np.repeat(dense.user, dense.clicked_lengths)
    many = np.flatnonzero(np.bincount(user) > 1_000)[:20]
    clicks = [dense.clicked_items[user == index] for index in many]
    own = np.mean([_cosine(items[::2], items[1::2]) for items in clicks])
    others = np.mean([_cosine(a[::2], b[1::2]) for a, b in pairwise(clicks)])
    assert own > 1.3 * others


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = (np.bincount(items, minlength=100_001).astype(np.float64) for items in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def test_sessions_are_the_pauses(facts: dict[str, Any]) -> None:
    assert facts["sessions"]["declared"] == facts["sessions"]["by_gap"] > USERS


def test_no_history_no_clicks_no_tail() -> None:
    trace = generate(
        GeneratorConfig(users=4, requests=400, history_median=0, clicks_mean=0.0, activity_sigma=0.0, taste=1.0)
    )
    assert len(trace.history_items) == len(trace.clicked_items) == 0
    assert np.bincount(trace.user).min() > 60


@pytest.mark.parametrize(
    ("clicks", "taste", "lift"), [(2.2, 0.6, 1.3), (5.0, 0.6, 50.0), (5.5, 0.5, 0.0), (5.8, 0.3, 2.0)]
)
def test_click_rates_keep_the_mean(clicks: float, taste: float, lift: float) -> None:
    config = GeneratorConfig(clicks_mean=clicks, taste=taste, taste_lift=lift)
    outside, inside = config.click_rates
    assert 0 <= outside <= 1 + 1e-12
    assert 0 <= inside <= 1 + 1e-12
    assert taste * inside + (1 - taste) * outside == pytest.approx(clicks / 5.8)


def test_more_requests_than_a_window_holds_still_fit() -> None:
    trace = generate(GeneratorConfig(users=2, requests=20_000, days=1, history_median=0))
    assert trace.t_ms[-1] - trace.t_ms[0] < 86_400_000


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("users", {"users": 0}),
        ("seed", {"seed": -1}),
        ("requests", {"requests": 2**40}),
        ("categories", {"categories": 10, "items": 9}),
        ("candidates_mean", {"candidates_mean": 9.0, "items": 10, "categories": 1}),
        ("clicks_mean", {"clicks_mean": 6.0}),
        ("start_ms", {"start_ms": 1_700_006_400_001}),
        ("start_ms", {"start_ms": 0}),
        ("candidates_spread", {"candidates_spread": "normal"}),
    ],
)
def test_bad_knobs_are_named(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        GeneratorConfig(**values)
    assert caught.value.field == field


def test_progress_counts_requests() -> None:
    seen: list[tuple[int, int]] = []
    generate(GeneratorConfig(users=3, requests=90, history_median=0), lambda *at: seen.append(at))
    assert seen[-1] == (90, 90)


def test_info_of_a_trace_by_hand() -> None:
    facts = info(sample_trace())
    assert facts["users"] == 3
    assert facts["users_with_requests"] == 2
    assert facts["history"]["total"] == 5
    assert facts["prefix_tokens"]["total"] == 0 + 3 + 2
    assert facts["candidate_tokens"] == 7
    assert facts["gap_s"]["count"] == 1
    assert facts["gap_s"]["shares"]["< 1 s"] == 1
    assert facts["load_by_hour"]["peak"] == 24
    assert json.loads(json.dumps(facts)) == facts | {"calibration": json.loads(json.dumps(facts["calibration"]))}


def test_info_text_says_what_it_is(facts: dict[str, Any]) -> None:
    text = info_text(facts)
    assert "calibrated-synthetic" in text
    assert "KuaiRand-27K" in text
    assert f"{PUBLISHED_REQUESTS:,} requests" in text
    assert "as recorded" not in text
    assert info_text(info(sample_trace().first(0)))
