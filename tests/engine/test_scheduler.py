"""What leaves the queue before its batch, and when the queue is looked through for it."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
from small_models import SCHEMA, make_behaviours, make_candidates, small_config

from mtserve.config import EngineConfig
from mtserve.engine.job import Job, make_job
from mtserve.engine.scheduler import Scheduler
from mtserve.engine.sequence import SequenceBuilder
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
