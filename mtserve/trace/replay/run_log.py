"""What one run over a trace left behind: one entry a request, and samples of memory along the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mtserve.trace.hits import TIER_NAMES
from mtserve.trace.schema import Ints
from mtserve.types import ScoreResult

UNANSWERED = -1


class MemorySample(NamedTuple):
    """Use of the tiers when `answered` requests had been answered, `seconds` into the run."""

    seconds: float
    answered: int
    gpu_pages: int
    host_pages: int


@dataclass
class RunLog:
    """N requests, C candidates in all. Requests that failed keep `tier` UNANSWERED and NaN elsewhere."""

    cand_offsets: Ints  # [N + 1]
    logits: npt.NDArray[np.float32]  # [C, tasks]
    latency_s: npt.NDArray[np.float64]  # [N]
    tier: npt.NDArray[np.int8]  # [N] index into TIER_NAMES
    position: Ints  # [N] behaviours of the history that was scored
    prefix_tokens: Ints  # [N]
    gpu_tokens: Ints  # [N]
    host_tokens: Ints  # [N]
    seconds: float = 0.0  # from the first submission to the last answer
    failures: Counter[str] = field(default_factory=Counter)
    first_failure: str = ""
    samples: list[MemorySample] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)  # of the engine, over the run alone
    stats: dict[str, Any] = field(default_factory=dict)  # of the engine, at the end
    device_peak_bytes: int = 0

    @classmethod
    def empty(cls, cand_offsets: Ints, tasks: int) -> RunLog:
        count = len(cand_offsets) - 1
        return cls(
            cand_offsets,
            logits=np.full((int(cand_offsets[-1]), tasks), np.nan, dtype=np.float32),
            latency_s=np.full(count, np.nan),
            tier=np.full(count, UNANSWERED, dtype=np.int8),
            position=np.zeros(count, dtype=np.int64),
            prefix_tokens=np.zeros(count, dtype=np.int64),
            gpu_tokens=np.zeros(count, dtype=np.int64),
            host_tokens=np.zeros(count, dtype=np.int64),
        )

    def answered(self, index: int, result: ScoreResult, latency_s: float) -> None:
        """Note the answer of request number `index`."""
        self.logits[self.cand_offsets[index] : self.cand_offsets[index + 1]] = result.logits
        self.latency_s[index] = latency_s
        self.tier[index] = TIER_NAMES.index(result.tier)
        self.position[index] = result.position
        self.prefix_tokens[index] = result.prefix_tokens
        self.gpu_tokens[index] = result.gpu_tokens
        self.host_tokens[index] = result.host_tokens

    def failed(self, error: BaseException) -> None:
        """Note that a request got an error."""
        self.failures[type(error).__name__] += 1
        self.first_failure = self.first_failure or str(error)

    @property
    def requests(self) -> int:
        return len(self.latency_s)

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """[N] whether each request was answered with scores."""
        return self.tier != UNANSWERED

    @property
    def throughput_rps(self) -> float:
        """Requests answered a second."""
        return float(self.done.sum()) / self.seconds if self.seconds else 0.0

    def latency_ms(self) -> dict[str, float]:
        """Quantiles over the answered requests; 0 when there is none."""
        times = self.latency_s[self.done] * 1000
        if not len(times):
            return dict.fromkeys(("p50", "p95", "p99", "mean", "max"), 0.0)
        p50, p95, p99 = np.percentile(times, (50, 95, 99)).tolist()
        return {"p50": p50, "p95": p95, "p99": p99, "mean": float(times.mean()), "max": float(times.max())}
