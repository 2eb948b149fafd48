"""The counters, gauges and histograms of one engine and the server in front of it.

Every instrument is declared in `TABLE`; a name or label that is not there is our bug and
raises KeyError. Nothing here knows how the numbers leave the process: `snapshot` serves
`Engine.stats`, `families` serves the Prometheus exporter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

BUCKETS_PER_DOUBLING = 35
"""Histogram buckets are 2^(1/35) apart: 2.0%, so a quantile is within 1% of the true one."""

TIERS = ("gpu", "host", "encoded")
SOURCES = ("gpu", "host", "cold")
GROUPS = ("0", "1", "2", "3")  # of layers, in the order in which a load brings them
WAYS = ("load", "split", "recompute")
REASONS = ("queue_full", "invalid", "not_found", "draining")
CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One declared instrument. `low` and `high`: a histogram covers 2^low to 2^high of its unit."""

    kind: str  # counter, gauge or histogram
    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)  # every value `label` can have, so that cardinality is bounded
    low: int = 0
    high: int = 0


def _counter(name: str, help: str, label: str = "", values: tuple[str, ...] = ("",)) -> Family:
    return Family("counter", name, help, label, values)


def _gauge(name: str, help: str, label: str = "", values: tuple[str, ...] = ("",)) -> Family:
    return Family("gauge", name, help, label, values)


def _histogram(name: str, help: str, low: int, high: int) -> Family:
    return Family("histogram", name, help, low=low, high=high)


TABLE: tuple[Family, ...] = (
    _counter("requests_total", "Score requests admitted"),
    _gauge("requests_in_flight", "Score requests admitted and not yet answered"),
    _histogram("request_seconds", "admission to answer of requests that were scored, in seconds", -20, 8),
    _counter("requests_by_tier_total", "scored requests by the slowest tier of their prefix", "tier", SOURCES),
    _counter("prefix_tokens_total", "prefix tokens of scored requests by where they were found", "tier", TIERS),
    _counter("candidates_total", "candidates scored"),
    _counter("rejected_total", "requests refused before any work", "reason", REASONS),
    _counter("cancelled_total", "requests cancelled by their caller"),
    _counter("deadline_exceeded_total", "requests dropped because their deadline passed"),
    _counter("failed_total", "requests failed by an error of ours"),
    _gauge("queue_length", "requests waiting for a batch"),
    _counter("batches_total", "batches run"),
    _histogram("batch_requests", "requests of a batch", 0, 17),
    _histogram("batch_tokens", "new tokens of a batch (behaviours to encode + candidates)", 0, 24),
    _histogram("batch_seconds", "one batch from planning to scores, in seconds", -20, 8),
    _gauge("loads_in_flight", "host to GPU copies under way"),
    _gauge("stores_in_flight", "GPU to host copies under way"),
    _gauge("load_bytes_in_flight", "bytes of the host to GPU copies under way"),
    _gauge("store_bytes_in_flight", "bytes of the GPU to host copies under way"),
    _gauge("unsaved_users", "users with states that the host does not have yet"),
    _counter("loads_total", "host to GPU copies completed"),
    _counter("stores_total", "GPU to host copies completed"),
    _counter("loads_failed_total", "host to GPU copies that failed; their tokens were encoded again"),
    _counter("stores_failed_total", "GPU to host copies that failed; their pages were not kept on the host"),
    _counter("batches_over_loads_total", "batches begun while pages of theirs were still on their way from the host"),
    _counter("load_wait_seconds_total", "by group of layers: seconds from the start of such a batch until its pages had come", "group", GROUPS),
    _counter("write_backs_deferred_total", "times that GPU to host copies began to wait because too many were under way"),
    _counter("spare_requests_total", "requests encoded without keeping their states, as the device had no room for them"),
    _counter("stores_declined_total", "users whom the policy did not let into a full host tier, until their next batch"),
    _counter("loads_declined_total", "prefixes encoded again because that was expected to be sooner than loading them"),
    _counter("restored_batches_total", "batches begun for users whose states only the host had, by what was expected to be soonest", "way", WAYS),
    _gauge("restore_prediction_error", "median of |predicted - actual| / actual time of such batches of late"),
    _counter("copies_stuck_total", "copies between the tiers that had not ended within copy_timeout_ms"),
    _counter("load_bytes_total", "bytes copied host to GPU"),
    _counter("store_bytes_total", "bytes copied GPU to host"),
    _histogram("load_seconds", "one host to GPU copy from submission to its end being noticed, in seconds", -20, 8),
    _histogram("store_seconds", "one GPU to host copy from submission to its end being noticed, in seconds", -20, 8),
    _histogram("return_seconds", "eviction of a user's GPU pages to loading or encoding them again, in seconds", -10, 22),
    _counter("evicted_pages_total", "pages evicted, by tier", "tier", ("gpu", "host")),
    _counter("evicted_unsaved_pages_total", "pages evicted from the GPU with states that the host did not have"),
    _gauge("pinned_users", "pinned users with pages that the budget covers, by tier", "tier", ("gpu", "host")),
    _gauge("pinned_pages", "pages of such users, by tier", "tier", ("gpu", "host")),
    _gauge("pages_in_use", "pages holding states, by tier", "tier", ("gpu", "host")),
    _gauge("pages_capacity", "pages a tier can hold", "tier", ("gpu", "host")),
    _counter("prefetches_total", "prefetches asked for, hints of appends included"),
    _counter("prefetches_superseded_total", "prefetches whose place a newer one of their user took"),
    _counter("prefetches_dropped_total", "prefetches dropped because too many waited"),
    _counter("appended_behaviours_total", "behaviours appended to histories"),
    _counter("generations_total", "generations started (new user, changed features, re-cut or correction)"),
    _counter("answers_total", "gRPC answers by status code; each item of a ScoreBatch counts too", "code", CODES),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family for family in TABLE}


@dataclass(frozen=True)
class Distribution:
    """A histogram as it stood at one moment. `buckets[i]` counts values up to `bound(i)`, not cumulated."""

    low: int
    buckets: tuple[int, ...]
    count: int
    sum: float
    max: float

    def quantile(self, share: float) -> float:
        """The value below which `share` (0 to 1) of the observations lie, to within 1%; 0 when there are none.

        Values below 2^low or above 2^high are known only as lying beyond that end.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share {share} is outside 0 to 1")
        rank, seen = max(1, math.ceil(share * self.count)), 0
        for index, count in enumerate(self.buckets):
            seen += count
            if seen >= rank:
                middle = math.exp2(self.low + (index - 0.5) / BUCKETS_PER_DOUBLING)
                return min(middle, self.max)
        return 0.0

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound, observations at or below it) at each power of two, as Prometheus wants them."""
        points, total = [], 0
        for index, count in enumerate(self.buckets[:-1]):
            total += count
            if index % BUCKETS_PER_DOUBLING == 0:
                points.append((math.exp2(self.low + index // BUCKETS_PER_DOUBLING), total))
        return points

    def summary(self) -> dict[str, float]:
        quantiles = {f"p{percent}": self.quantile(percent / 100) for percent in (50, 95, 99)}
        return {"count": self.count, "sum": self.sum, "max": self.max, **quantiles}


class Histogram:
    """Counts values in logarithmic buckets; bucket 0 takes all up to 2^low, the last all above 2^high."""

    __slots__ = ("_buckets", "_last", "_lock", "_low", "_max", "_sum")

    def __init__(self, low: int, high: int) -> None:
        self._lock = threading.Lock()
        self._low = low
        self._last = (high - low) * BUCKETS_PER_DOUBLING + 1
        self._buckets = [0] * (self._last + 1)
        self._sum = 0.0
        self._max = 0.0

    def observe(self, value: float) -> None:
        index = self._bucket(value)
        with self._lock:
            self._buckets[index] += 1
            self._sum += value
            if value > self._max:
                self._max = value

    def observe_many(self, values: Sequence[float]) -> None:
        """As many `observe`, under one lock."""
        indices: list[int] = []
        last = math.nan
        for value in values:
            # What began together, and ends so, is often as long.
            indices.append(indices[-1] if value == last else self._bucket(value))
            last = value
        with self._lock:
            for index in indices:
                self._buckets[index] += 1
            self._sum += sum(values)
            self._max = max(self._max, max(values, default=0.0))

    def _bucket(self, value: float) -> int:
        if value <= 0:
            return 0
        # 1e-9 keeps exact powers of two, which round up by an ulp or two, in their own bucket.
        index = math.ceil((math.log2(value) - self._low) * BUCKETS_PER_DOUBLING - 1e-9)
        if index < 0:
            return 0
        return index if index < self._last else self._last

    def read(self) -> Distribution:
        with self._lock:
            buckets, total, largest = tuple(self._buckets), self._sum, self._max
        return Distribution(self._low, buckets, sum(buckets), total, largest)


class Metrics:
    """All instruments of `TABLE`, each at 0. Safe to update from any thread.

    An update is a dict lookup under one lock, well under 1 us.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        every = [(family, value) for family in TABLE for value in family.values]
        self._numbers: dict[tuple[str, str], float] = {(f.name, v): 0 for f, v in every if f.kind != "histogram"}
        self._histograms = {f.name: Histogram(f.low, f.high) for f in TABLE if f.kind == "histogram"}

    def count(self, name: str, amount: float = 1, label: str = "") -> None:
        """Add `amount` to a counter (never negative) or, of either sign, to a gauge."""
        with self._lock:
            self._numbers[name, label] += amount

    def count_many(self, amounts: Iterable[tuple[str, float, str]]) -> None:
        """Many `count` (name, amount, label) under one lock: nobody sees some of them done and others not."""
        with self._lock:
            for name, amount, label in amounts:
                self._numbers[name, label] += amount

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        key = (name, label)
        with self._lock:
            if key not in self._numbers:
                raise KeyError(key)
            self._numbers[key] = value

    def observe(self, name: str, value: float) -> None:
        """Add one observation to a histogram, in the unit its name states."""
        self._histograms[name].observe(value)

    def observe_many(self, name: str, values: Sequence[float]) -> None:
        """Add many observations to a histogram at once."""
        self._histograms[name].observe_many(values)

    def value(self, name: str, label: str = "") -> float:
        """The present value of a counter or gauge."""
        return self._numbers[name, label]

    def distribution(self, name: str) -> Distribution:
        """The present state of a histogram."""
        return self._histograms[name].read()

    def families(self) -> Iterator[tuple[Family, dict[str, float] | Distribution]]:
        """Every family with its values by label, or with its distribution."""
        for family in TABLE:
            if family.kind == "histogram":
                yield family, self.distribution(family.name)
            else:
                yield family, {value: self.value(family.name, value) for value in family.values}

    def snapshot(self) -> dict[str, Any]:
        """JSON-able: a number, a dict by label, or count, sum, max, p50, p95 and p99, by family name."""
        result: dict[str, Any] = {}
        for family, values in self.families():
            if isinstance(values, Distribution):
                result[family.name] = values.summary()
            else:
                result[family.name] = values if family.label else values[""]
        return result
