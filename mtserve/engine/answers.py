"""What a batch's scores become: results for those who asked, and the counts of what was scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from mtserve.engine.forward.batch import BatchPlan
from mtserve.engine.request.job import Job
from mtserve.errors import CorruptState
from mtserve.metrics import Metrics
from mtserve.types import Clock, ScoreResult

Float32s = npt.NDArray[np.float32]


class Answers:
    """Answers the jobs of a batch. `invalidate(user_id)` forgets states that scores show to be broken."""

    def __init__(self, metrics: Metrics, clock: Clock, invalidate: Callable[[str], object]) -> None:
        self._metrics, self._clock, self._invalidate = metrics, clock, invalidate

    def give(
        self, plan: BatchPlan, logits: Float32s, tasks: tuple[str, ...], seconds: float, without: Collection[str]
    ) -> None:
        """`logits` [candidates of the batch, tasks], which took `seconds`; users `without` are answered by a later batch."""
        metrics = self._metrics
        metrics.count("batches_total")
        metrics.observe("batch_requests", len(plan.scored))
        metrics.observe("batch_tokens", plan.tokens)
        metrics.observe("batch_seconds", seconds)
        scores = np.tanh(0.5 * logits)
        scores += 1.0
        scores *= 0.5
        finite, now = bool(np.isfinite(logits).all()), self._clock()
        results = []
        for job, first, last in plan.scored:
            if job.user_id in without:
                continue
            if finite or np.isfinite(logits[first:last]).all():
                results.append(self._answer(make_result(job, logits[first:last], scores[first:last], tasks, now), job))
            else:
                self._refuse(job)
        count_scored(metrics, [result for result in results if result is not None])

    def _answer(self, result: ScoreResult, job: Job) -> ScoreResult | None:
        """Answer `job`; its result when there are scores and somebody still waits for them."""
        if not job.resolve(result):
            self._metrics.count("cancelled_total")
            return None
        return result if len(result.logits) else None

    def _refuse(self, job: Job) -> None:
        self._invalidate(job.user_id)
        job.fail(CorruptState(f"scores of user {job.user_id!r} are not finite; the user's states were dropped"))
        self._metrics.count("failed_total")


def make_result(job: Job, logits: Float32s, scores: Float32s, tasks: tuple[str, ...], now: float) -> ScoreResult:
    """The answer of `job`; `logits` and `scores` [its candidates, tasks]."""
    prefix, gpu, host = job.prefix, job.found_gpu, job.found_host
    return ScoreResult(
        scores=scores,
        logits=logits,
        tasks=tasks,
        position=job.sequence.position,
        prefix_tokens=prefix,
        gpu_tokens=gpu,
        host_tokens=host,
        encoded_tokens=prefix - gpu - host,
        latency_s=now - job.arrived,
    )


def count_scored(metrics: Metrics, results: Sequence[ScoreResult]) -> None:
    """Count the answers of a batch that had scores, all at once."""
    tiers = Counter(result.tier for result in results)
    metrics.observe_many("request_seconds", [result.latency_s for result in results])
    metrics.count_many(
        (
            ("candidates_total", sum(len(result.scores) for result in results), ""),
            ("prefix_tokens_total", sum(result.gpu_tokens for result in results), "gpu"),
            ("prefix_tokens_total", sum(result.host_tokens for result in results), "host"),
            ("prefix_tokens_total", sum(result.encoded_tokens for result in results), "encoded"),
            *(("requests_by_tier_total", count, tier) for tier, count in tiers.items()),
        )
    )
