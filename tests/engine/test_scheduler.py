"""What leaves the queue before its batch, and when the queue is looked through for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
from small_models import SCHEMA, make_behaviours, make_candidates, small_config

from mtserve.config import EngineConfig
from mtserve.engine.queue.scheduler import Scheduler
from mtserve.engine.request.job import Job, make_job
from mtserve.engine.request.sequence import SequenceBuilder
from mtserve.errors import DeadlineExceeded
from mtserve.metrics import Metrics
from mtserve.types import History, ScoreResult

BUILDER = SequenceBuilder(small_config(), SCHEMA, "weights")


def job_of(user: str, candidates: int = 2, deadline: float | None = None) -> Job:
    rng = np.random.default_rng(0)
    sequence = BUILDER.build(user, History(None, 0, make_behaviours(rng, 5)))
    future: Future[ScoreResult] = Future()
    return make_job(sequence, make_candidates(rng, candidates), future, 100.0, deadline)


def queue_of(*jobs: Job, metrics: Metrics | None = None, **config: int) -> Scheduler:
    scheduler = Scheduler(EngineConfig(**config), metrics or Metrics(), static_attention="full")
    for job in jobs:
        scheduler.add(job)
    return scheduler


def test_scores_come_before_prefetches_each_in_order_of_arrival() -> None:
    jobs = [job_of("a", 0), job_of("b"), job_of("c", 0), job_of("d")]
    scheduler = queue_of(*jobs)
    assert list(scheduler.jobs()) == [jobs[1], jobs[3], jobs[0], jobs[2]]
    scheduler.remove([jobs[3], jobs[0], jobs[3]])
    assert list(scheduler.jobs()) == [jobs[1], jobs[2]]
    assert (len(scheduler), scheduler.scores) == (2, 1)
    assert scheduler.clear() == [jobs[1], jobs[2]]
    assert len(scheduler) == 0


def test_a_batch_takes_its_jobs_out_and_leaves_the_others() -> None:
    jobs = [job_of(user) for user in "abc"]
    scheduler = queue_of(*jobs)
    slots = scheduler.take(lambda job: None if job is jobs[1] else 0)
    assert [slot.jobs for slot in slots] == [[jobs[0]], [jobs[2]]]
    assert list(scheduler.jobs()) == [jobs[1]]


@pytest.mark.parametrize("way", ["restored", "spare"])
def test_requests_of_one_user_that_wait_for_states_are_no_more_than_a_batch_takes(way: str) -> None:
    jobs = [job_of("a") for _ in range(5)]
    scheduler = queue_of(*jobs, max_batch_requests=3)
    slots = scheduler.take(
        lambda job: None, lambda job: way == "spare", lambda job: 0 if way == "restored" else None
    )  # fmt: skip
    assert [slot.jobs for slot in slots] == [jobs[:3]]
    assert list(scheduler.jobs()) == jobs[3:]


def passing(**found: tuple[int, bool]) -> Callable[[Job], tuple[int, bool] | None]:
    return lambda job: found.get(job.user_id)


def test_who_should_not_wait_joins_the_batch_of_others_and_those_without_pages_come_last() -> None:
    jobs = {user: job_of(user) for user in "abcd"}
    scheduler = queue_of(*jobs.values())
    slots = scheduler.take(
        lambda job: 2 if job is jobs["d"] else None, passes=passing(a=(0, False), b=(3, True)), idle=False
    )
    assert [(slot.user_id, slot.cached, slot.keep) for slot in slots] == [
        ("d", 2, True),
        ("b", 3, True),
        ("a", 0, False),
    ]
    assert list(scheduler.jobs()) == [jobs["c"]]


@pytest.mark.parametrize("idle", [False, True])
def test_only_who_needs_no_room_is_a_batch_for_being_better_not_kept_waiting(idle: bool) -> None:
    jobs = [job_of("a"), job_of("b")]
    scheduler = queue_of(*jobs)
    assert scheduler.take(lambda job: None, passes=passing(b=(3, True)), idle=idle) == []
    slots = scheduler.take(lambda job: None, passes=passing(a=(0, False), b=(3, True)), idle=idle)
    assert [(slot.user_id, slot.keep) for slot in slots] == [("b", True), ("a", False)]


@pytest.mark.parametrize("room", [17, 18])
def test_beside_loads_everybody_is_counted_whole(room: int) -> None:
    """They may evict what the device has of b: 7 tokens and 2 candidates each."""
    jobs = [job_of("a"), job_of("b")]
    scheduler = queue_of(*jobs, max_batch_tokens=room)
    slots = scheduler.take(
        lambda job: None, restorable=lambda job: 0 if job is jobs[0] else None, passes=passing(b=(6, True))
    )
    assert [slot.user_id for slot in slots] == (["a", "b"] if room == 18 else ["a"])


def test_nobody_is_twice_in_a_batch() -> None:
    jobs = [job_of("a"), job_of("b"), job_of("b")]
    scheduler = queue_of(*jobs)
    slots = scheduler.take(
        lambda job: None, lambda job: True, lambda job: 1, passing(a=(1, True), b=(0, False))
    )  # fmt: skip
    assert [slot.jobs for slot in slots] == [[jobs[0]], jobs[1:]]


def test_nobody_comes_ahead_of_a_ready_user_too_large_for_the_budgets() -> None:
    jobs = [job_of("a", 40), job_of("b")]
    scheduler = queue_of(*jobs, max_batch_tokens=30, cold_batch_tokens=30)
    slots = scheduler.take(lambda job: 4 if job is jobs[0] else None, passes=passing(b=(0, False)))
    assert [slot.jobs for slot in slots] == [[jobs[0]]]


def test_what_fills_a_batch_with_whole_prefixes_keeps_to_the_cold_users_budget() -> None:
    jobs = [job_of(user) for user in "abc"]  # 7 tokens and 2 candidates each
    scheduler = queue_of(*jobs, cold_batch_tokens=20)
    slots = scheduler.take(lambda job: None, passes=passing(a=(0, False), b=(0, False), c=(0, False)))
    assert [slot.jobs for slot in slots] == [[jobs[0]], [jobs[1]]]


def test_batches_with_later_arrivals_are_counted_for_who_waits() -> None:
    jobs = {user: job_of(user) for user in "abcd"}
    scheduler = queue_of(*jobs.values())
    ready = {jobs["c"]}
    scheduler.take(lambda job: 2 if job in ready else None)
    scheduler.take(lambda job: None)
    assert {user: job.overtaken for user, job in jobs.items()} == {"a": 1, "b": 1, "c": 0, "d": 0}
    ready = {jobs["b"], jobs["d"]}
    scheduler.take(lambda job: 2 if job in ready else None)
    assert [job.overtaken for job in scheduler.jobs()] == [2]


@pytest.mark.parametrize("candidates", [0, 3])
def test_a_cancelled_job_leaves_once_it_is_told_of(candidates: int) -> None:
    metrics = Metrics()
    jobs = [job_of("a"), job_of("b", candidates), job_of("c")]
    scheduler = queue_of(*jobs, metrics=metrics)
    jobs[1].future.cancel()
    scheduler.cancelled()
    scheduler.drop_hopeless(101.0, 0.0)
    assert list(scheduler.jobs()) == [jobs[0], jobs[2]]
    assert metrics.value("cancelled_total") == 1


def test_a_job_cancelled_on_its_way_to_the_queue_leaves_too() -> None:
    scheduler, late = queue_of(job_of("a")), job_of("b")
    late.future.cancel()
    scheduler.cancelled()
    scheduler.drop_hopeless(101.0, 0.0)  # before the job is there
    scheduler.add(late)
    scheduler.drop_hopeless(101.0, 0.0)
    assert [job.user_id for job in scheduler.jobs()] == ["a"]


def test_each_job_is_judged_by_its_own_deadline_and_size() -> None:
    """Whatever was queued, dropped and taken before: who is dropped is who cannot make it, no more and no fewer."""
    rng, metrics = np.random.default_rng(1), Metrics()
    scheduler, dropped = queue_of(metrics=metrics), 0
    waiting: list[Job] = []
    for turn in range(200):
        now, token_s = 100.0 + turn / 10, float(rng.choice([0.0, 0.01, 0.1]))
        for _ in range(int(rng.integers(0, 4))):
            deadline = None if rng.random() < 0.3 else now + float(rng.uniform(0, 3))
            waiting.append(job_of(f"u{turn}", int(rng.integers(1, 20)), deadline))
            scheduler.add(waiting[-1])
        doomed = [
            job for job in waiting if job.deadline is not None and job.deadline <= now + token_s * len(job.candidates)
        ]
        scheduler.drop_hopeless(now, token_s)
        waiting = [job for job in waiting if job not in doomed]
        assert list(scheduler.jobs()) == waiting
        assert all(isinstance(job.future.exception(0), DeadlineExceeded) for job in doomed)
        dropped += len(doomed)
        if waiting and rng.random() < 0.5:
            scheduler.remove([waiting.pop(int(rng.integers(len(waiting))))])
    assert metrics.value("deadline_exceeded_total") == dropped > 50
