"""What a simulation can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mtserve.config import Config, option
from mtserve.restore.gpus import GPUS

POLICIES = ("lru", "s3fifo", "sieve", "wtinylfu", "arc", "gdsf", "locality", "gap-oracle", "belady")


@dataclass(frozen=True)
class SimulateConfig(Config):
    """What is tried, how it is sampled, and whose figures foretell the rest."""

    policy: str = option("lru", f"which users lose their states first, one or more with commas: {', '.join(POLICIES)}")
    gpu_cache: str = option(
        "5%,10%,25%,50%,100%",
        "sizes of the GPU tier, with commas: shares of the trace's working set, or bytes ('38GiB')",
    )
    host_cache: str = option("0,100%", "sizes of the host tier, likewise; 0 is the GPU tier alone")
    gpu: str = option("h200", "the GPU whose figures foretell throughput and latency", choices=tuple(GPUS))
    jobs: int = option(0, "cells simulated at once; 0: as many as there are cores", low=0, high=1024)
    curves: bool = option(True, "also simulate miss-ratio curves, and what memory a target needs")
    sample_users: int = option(
        8192, "users whose requests make the curves, about; all where there are fewer", low=1, high=50_000_000
    )
    sample_rate: float = option(
        0.0, "share of the users that make the curves, instead; 0: as sample_users says", low=0.0, high=1.0
    )
    sample_seed: int = option(0, "seed of which users these are", low=0, high=2**63 - 1)

    @property
    def threads(self) -> int:
        return self.jobs or len(os.sched_getaffinity(0))
