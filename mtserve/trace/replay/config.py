"""What a replay can be told."""

from __future__ import annotations

from dataclasses import dataclass

from mtserve.config import Config, option


@dataclass(frozen=True)
class ReplayConfig(Config):
    """How a trace is driven, compared and checked."""

    concurrency: int = option(8, "requests in flight in the closed loop", low=1, high=65536)
    speed: float = option(
        0.0,
        "open loop: requests arrive at the trace's times, this many times faster; 0: closed loop",
        low=0.0,
        high=1e9,
    )
    requests: int = option(0, "replay only so many of the trace's first requests; 0: all", low=0, high=2**40)
    baseline_requests: int = option(
        -1, "requests of the run without a cache, from the first on; -1: all, 0: no such run", low=-1, high=2**40
    )
    verify: int = option(8, "random requests held against a full fp32 recompute on the CPU", low=0, high=1_000_000)
    verify_tokens: int = option(
        1024, "longest request of these (the recompute's time grows with the square)", low=1, high=65536, unit="tokens"
    )
    seed: int = option(0, "seed of the model's weights (presets) and of the verified sample", low=0, high=2**31 - 1)
