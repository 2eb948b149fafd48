from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from replay_world import TASKS, FakeEngine, small_trace, tiny_model

from mtserve.trace.replay.agreement import misplaced
from mtserve.trace.replay.driver import Driver
from mtserve.trace.replay.features import TraceRows
from mtserve.trace.replay.run_log import RunLog
from mtserve.trace.schema import Trace


def _drive(trace: Trace, *, concurrency: int, speed: float = 0.0, **engine: Any) -> tuple[FakeEngine, RunLog]:
    rows = TraceRows(trace, tiny_model().schema)
    fake, run = FakeEngine(rows, **engine), RunLog.empty(trace.cand_offsets, TASKS)
    Driver(fake, rows, run, concurrency=concurrency, speed=speed).drive()  # type: ignore[arg-type]
    assert misplaced(run, rows) == 0
    return fake, run


@pytest.mark.parametrize(("concurrency", "speed"), [(1, 0.0), (8, 0.0), (64, 1e9), (64, 5e6)])
def test_a_user_has_one_request_in_flight_and_its_clicks_come_before_the_next(concurrency: int, speed: float) -> None:
    trace = small_trace(users=4, requests=60)
    fake, run = _drive(trace, concurrency=concurrency, speed=speed)
    by_user: dict[str, list[str]] = defaultdict(list)
    for what, user in fake.events:
        by_user[user].append(what)
    clicked: dict[str, list[bool]] = defaultdict(list)
    for request in trace.iter_requests():
        clicked[request.user].append(len(request.clicked) > 0)
    for user, flags in clicked.items():
        expected = [what for some in flags for what in ("submit", "answer", "append")[: 3 if some else 2]]
        assert by_user[user] == expected
    assert run.done.all()


def test_the_closed_loop_keeps_to_its_concurrency_and_uses_it() -> None:
    fake, run = _drive(small_trace(users=12, requests=60), concurrency=3)
    assert fake.busiest == 3
    assert run.seconds > 0
    assert run.throughput_rps == pytest.approx(60 / run.seconds)


def test_requests_of_other_users_pass_those_that_wait_for_their_own() -> None:
    trace = small_trace(users=6, requests=60)
    fake, _ = _drive(trace, concurrency=6)
    submitted = [user for what, user in fake.events if what == "submit"]
    assert submitted != [request.user for request in trace.iter_requests()]


def test_open_loop_latency_counts_the_queue() -> None:
    trace = small_trace(users=20, requests=20)
    _, closed = _drive(trace, concurrency=1, serial_s=0.01)
    _, opened = _drive(trace, concurrency=64, speed=1e9, serial_s=0.01)
    # All arrive at once: the last waits for twenty answers of 10 ms, parked or queued.
    assert opened.latency_s.max() > 0.19
    assert np.median(closed.latency_s) < 0.1
    assert closed.latency_ms()["p50"] < opened.latency_ms()["p50"]


def test_open_loop_arrivals_follow_the_trace() -> None:
    trace = small_trace(users=5, requests=12)
    span_s = (trace.t_ms[-1] - trace.t_ms[0]) / 1000
    _, run = _drive(trace, concurrency=64, speed=float(span_s) / 0.3)
    assert 0.3 <= run.seconds < 1.5
    assert np.median(run.latency_s) < 0.1


def test_failed_requests_are_counted_and_the_rest_goes_on() -> None:
    trace = small_trace()
    fake, run = _drive(trace, concurrency=4, fail=frozenset({2, 9}))
    assert run.failures == {"RuntimeError": 2}
    assert run.first_failure == "as told"
    assert int(run.done.sum()) == trace.requests - 2
    assert np.isnan(run.logits).any(axis=1).sum() == trace.cand_lengths[~run.done].sum()
    assert fake.position == {
        user: int(n)
        for user, n in zip(trace.user_ids, TraceRows(trace, tiny_model().schema).final_positions(), strict=True)
    }
