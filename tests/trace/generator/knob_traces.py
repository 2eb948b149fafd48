"""Traces with a few knobs turned."""

from __future__ import annotations

from typing import Any

from mtserve.trace.generator.bursts import BurstConfig
from mtserve.trace.generator.clock import WeekConfig
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.crowds import CrowdConfig
from mtserve.trace.generator.launches import LaunchConfig
from mtserve.trace.generator.newcomers import NewcomerConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.schema import Trace

START_MS = GeneratorConfig().start_ms
COLUMNS = (
    "history_offsets", "history_items", "history_t_ms", "history_actions", "user", "t_ms", "session",
    "cand_offsets", "cand_items", "clicked_offsets", "clicked_items", "clicked_actions",
)  # fmt: skip
ALL_KNOBS: dict[str, Any] = {
    "groups": "heavy casual:share=0.3 night early:share=0.1,later=20,gap=0.1",
    "week": WeekConfig(night=0.5, weekend=0.5),
    "bursts": BurstConfig(like="code", moves="requests"),
    "crowds": CrowdConfig(events=5, load=20.0, users=0.3, items=7),
    "newcomers": NewcomerConfig(share=0.3, over_days=4, history=6),
    "launches": LaunchConfig(items=30, share=0.2),
}


def made(**knobs: Any) -> Trace:
    """A trace of 500 users and 20,000 requests of one candidate each, but for `knobs`."""
    plain = {"users": 500, "requests": 20_000, "history_median": 0, "candidates_mean": 1.0, "clicks_mean": 0.4}
    return generate(GeneratorConfig(**{**plain, **knobs}))


def digest_of_columns(trace: Trace) -> list[bytes]:
    return [getattr(trace, name).tobytes() for name in COLUMNS]
