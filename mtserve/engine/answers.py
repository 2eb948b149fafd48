"""What a batch's scores become: results for those who asked, and the counts of what was scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mtserve.engine.job import Job
from mtserve.metrics import Metrics
from mtserve.types import ScoreResult

Float32s = npt.NDArray[np.float32]


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
