"""The knobs of the generator together, and what they leave alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from knob_traces import ALL_KNOBS, COLUMNS, START_MS, digest_of_columns, made

from mtserve.errors import InvalidArgument
from mtserve.trace.calendar import DAY_MS
from mtserve.trace.generator.bursts import BurstConfig
from mtserve.trace.generator.clock import WeekConfig
from mtserve.trace.generator.config import MAX_REQUESTS, GeneratorConfig
from mtserve.trace.generator.crowds import CrowdConfig
from mtserve.trace.generator.launches import MAX_LAUNCHES, LaunchConfig
from mtserve.trace.generator.newcomers import NewcomerConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.meta import meta_to_json
from mtserve.trace.schema import Trace


def digest(trace: Trace) -> str:
    hashed = hashlib.sha256(meta_to_json(trace.meta).encode())
    for name in COLUMNS:
        hashed.update(getattr(trace, name).tobytes())
    return hashed.hexdigest()[:32]


@pytest.mark.parametrize(
    ("expected", "knobs"),
    [
        ("c430def7c24efb233b77cd3afeeb4b72", {"users": 20, "requests": 500, "seed": 4, "history_median": 10}),
        (
            "01a13757abcd95ed7059852b2ff8f081",
            {
                "users": 30, "requests": 400, "days": 3, "seed": 9, "history_median": 20, "items": 4000,
                "candidates_mean": 40.0, "candidates_spread": "fixed", "taste": 0.3,
            },
        ),
        ("1bb36fce9f2606a1b75bbaa56bfcc595", {"users": 1000, "requests": 60_000, "history_median": 100}),
    ],
)  # fmt: skip
def test_traces_without_these_knobs_are_what_they_were_before_them(expected: str, knobs: dict[str, Any]) -> None:
    assert digest(generate(GeneratorConfig(**knobs))) == expected


@pytest.mark.parametrize("name", ["week", "bursts", "newcomers", "launches"])
def test_a_knob_leaves_the_other_draws_alone(name: str) -> None:
    knobs: dict[str, Any] = {"candidates_mean": 5.8, "clicks_mean": 2.2, "history_median": 20}
    plain, turned = made(**knobs), made(**knobs, **{name: ALL_KNOBS[name]})
    assert digest_of_columns(plain) != digest_of_columns(turned)
    assert np.array_equal(plain.cand_offsets, turned.cand_offsets)
    if name != "newcomers":
        assert np.array_equal(plain.history_items, turned.history_items)
    seen = [np.bincount(trace.cand_items, minlength=100_031)[:100_001] for trace in (plain, turned)]
    assert np.corrcoef(*seen)[0, 1] > 0.8, "item ids are the same"


def test_all_knobs_together_make_a_valid_trace_twice() -> None:
    config = GeneratorConfig(
        users=300, requests=5_000, days=10, history_median=20, items=400, categories=7, seed=3, **ALL_KNOBS
    )
    trace = generate(config)
    assert trace.requests == 5_000 + 5 * config.crowds.requests(5_000, 10)
    assert trace == generate(config)
    assert trace.meta.config["crowds.events"] == 5
    assert "conversation" not in trace.meta.source
    assert "code" in trace.meta.source
    highest = 400 + MAX_LAUNCHES + 5 * 7
    assert trace.cand_items.max() <= highest
    assert (trace.cand_items > 400 + MAX_LAUNCHES).any()
    for request in trace.iter_requests():
        assert len(set(request.cand.tolist())) == len(request.cand)


@pytest.mark.parametrize(("users", "requests", "days"), [(1, 0, 1), (1, 1, 1), (2, 50, 1), (3, 40, 2)])
def test_all_knobs_hold_for_next_to_nothing(users: int, requests: int, days: int) -> None:
    knobs = {**ALL_KNOBS, "newcomers": NewcomerConfig(share=0.5, over_days=1)}
    trace = generate(GeneratorConfig(users=users, requests=requests, days=days, history_median=3, **knobs))
    assert trace.users == users
    assert trace.requests >= requests


def test_extremes_of_all_knobs_hold() -> None:
    trace = made(
        days=2,
        groups="a:share=0.5,activity=1000,history=1000,gap=100,taste=1000,later=24 b:share=0.5,activity=0.001,gap=0.01",
        week=WeekConfig(night=2.0, weekend=20.0),
        bursts=BurstConfig(like="code", strength=10.0),
        crowds=CrowdConfig(events=20, users=1.0, load=50.0, minutes=1_440.0, items=2, item_share=1.0),
        newcomers=NewcomerConfig(share=1.0, over_days=2, history=1_000_000),
        launches=LaunchConfig(items=1_000, share=1.0, half_life_hours=0.1),
        history_median=2,
    )
    assert trace.t_ms[-1] < START_MS + 2 * DAY_MS
    assert trace.requests > 20_000


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("weekend", lambda: WeekConfig(weekend=0.0)),
        ("night", lambda: WeekConfig(night=-1.0)),
        ("like", lambda: BurstConfig(like="azure")),
        ("moves", lambda: BurstConfig(moves="users")),
        ("events", lambda: CrowdConfig(events=-1)),
        ("minutes", lambda: CrowdConfig(minutes=0.0)),
        ("share", lambda: NewcomerConfig(share=1.1)),
        ("half_life_hours", lambda: LaunchConfig(half_life_hours=0.0)),
        ("items", lambda: LaunchConfig(items=MAX_LAUNCHES + 1)),
        ("days", lambda: GeneratorConfig(days=500, bursts=BurstConfig(like="code"))),
        ("newcomers.over_days", lambda: GeneratorConfig(newcomers=NewcomerConfig(over_days=8))),
        ("crowds.load", lambda: GeneratorConfig(requests=MAX_REQUESTS, crowds=CrowdConfig(events=1))),
        ("week.weekend", lambda: GeneratorConfig(users=50_000_000, days=31, week=WeekConfig(weekend=0.5))),
        ("crowds", lambda: GeneratorConfig.from_table({"crowds": 3})),
        ("crowds.events", lambda: GeneratorConfig.from_table({"crowds": {"events": 1.5}})),
    ],
)
def test_bad_parts_are_named(field: str, part: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        part()
    assert caught.value.field == field
