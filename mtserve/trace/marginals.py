"""A trace's marginals beside the published figures that generated traces are fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mtserve.trace.burstiness import WINDOWS_S
from mtserve.trace.calibration import GAP_LABELS

KUAIRAND_NAME, EBNERD_NAME = "KuaiRand-27K", "EB-NeRD"
AZURE_NAMES = {"conversation": "Azure conversation", "code": "Azure code"}
QUANTILES = ("p50", "p95", "p99")


class Marginal(NamedTuple):
    """One figure of a trace; `published` None where it has no published counterpart."""

    label: str
    here: float | None
    published: float | None = None
    of: str = ""

    @property
    def difference(self) -> float | None:
        """Relative to the published figure; None where there is none, or none here."""
        if self.here is None or not self.published:
            return None
        return self.here / self.published - 1


def marginals(facts: dict[str, Any]) -> list[Marginal]:
    """Of the facts that `info.info` finds in a trace."""
    return [*_users(facts), *_requests(facts), *_gaps(facts), *_load(facts), *_bursts(facts)]


def _users(facts: dict[str, Any]) -> Iterator[Marginal]:
    kuairand, ebnerd = facts["calibration"]["kuairand"], facts["calibration"]["ebnerd"]
    history, per_user = facts["history"], facts["requests_per_user"]
    for q in QUANTILES:
        yield Marginal(f"history, {q}", history[q], kuairand["clicks_per_user"][q], f"{KUAIRAND_NAME}, clicks")
    yield from (Marginal(f"history, {q}", history[q], ebnerd["history"][q], EBNERD_NAME) for q in ("p50", "p95"))
    yield Marginal("requests per user, p50", per_user["p50"], ebnerd["requests_per_user"]["p50"], EBNERD_NAME)
    for name, published in (
        (KUAIRAND_NAME, kuairand["exposures_per_user"]),
        (EBNERD_NAME, ebnerd["requests_per_user"]),
    ):
        for q in QUANTILES[1:]:
            if q in published:
                ratio = per_user[q] / max(per_user["p50"], 1)
                yield Marginal(f"requests per user, {q} / p50", ratio, published[q] / published["p50"], name)
    share = facts["top_10_percent_share"]
    yield Marginal("share of the top 10% of users", share, kuairand["top_10_percent_share"], KUAIRAND_NAME)


def _requests(facts: dict[str, Any]) -> Iterator[Marginal]:
    kuairand, ebnerd = facts["calibration"]["kuairand"], facts["calibration"]["ebnerd"]
    candidates = facts["candidates"]
    yield Marginal("candidates, mean", candidates["mean"], kuairand["candidates_mean"], KUAIRAND_NAME)
    for q in ("p50", "p95"):
        yield Marginal(f"candidates, {q}", candidates[q], ebnerd["candidates"][q], EBNERD_NAME)
    yield Marginal("clicks, mean", facts["clicks"]["mean"], kuairand["clicks_mean"], KUAIRAND_NAME)
    yield Marginal("prefix tokens of a request, mean", facts["prefix_tokens"]["mean"])


def _gaps(facts: dict[str, Any]) -> Iterator[Marginal]:
    gaps = facts["gap_s"]
    for label, share in zip(GAP_LABELS, facts["calibration"]["kuairand"]["gap_shares"], strict=True):
        yield Marginal(f"gaps of {label}", gaps["shares"][label], share, KUAIRAND_NAME)
    for q, published in facts["calibration"]["ebnerd"]["gap_s"].items():
        yield Marginal(f"gap {q}, s", gaps[q], published, EBNERD_NAME)


def _load(facts: dict[str, Any]) -> Iterator[Marginal]:
    kuairand, load = facts["calibration"]["kuairand"], facts["load_by_hour"]
    yield Marginal("load by hour, peak", load["peak"], kuairand["load_peak"], KUAIRAND_NAME)
    yield Marginal("load by hour, trough", load["trough"], kuairand["load_trough"], KUAIRAND_NAME)
    yield Marginal("load of a weekend day / weekday", facts["weekend_load"])


def burst_service(facts: dict[str, Any]) -> str:
    """The Azure service that a trace's bursts are held against: the one it was made like, else conversation."""
    return str(facts["bursts"]["like"] or "conversation")


def _bursts(facts: dict[str, Any]) -> Iterator[Marginal]:
    service = burst_service(facts)
    azure, name = facts["calibration"]["azure"][service], AZURE_NAMES[service]
    for what, here in (("requests", facts["bursts"]["requests"]), ("sessions", facts["bursts"]["sessions"])):
        for window in map(str, WINDOWS_S):
            published = azure["load_variance"][window]
            yield Marginal(f"load variance, {window} s, {what}", here["load_variance"][window], published, name)
    for window in map(str, WINDOWS_S):
        yield Marginal(f"index of dispersion, {window} s, requests", facts["bursts"]["requests"]["dispersion"][window])
    requests = facts["bursts"]["requests"]
    yield Marginal("inter-arrival times, squared CV", requests["gap_scv"], azure["gap_scv"], name)
    correlation = requests["minute_correlation"]
    yield Marginal("minute counts, autocorrelation", correlation, azure["minute_correlation"], name)


def marginals_text(rows: list[Marginal]) -> list[str]:
    """The lines of a table."""
    lines = [f"  {'':37}{'this trace':>12}{'published':>12}{'difference':>12}  of"]
    for row in rows:
        difference = "-" if row.difference is None else f"{round(100 * row.difference):+,d}%"
        cells = f"{_cell(row.here):>12}{_cell(row.published):>12}{difference:>12}"
        lines.append(f"  {row.label:37}{cells}  {row.of}".rstrip())
    return lines


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
