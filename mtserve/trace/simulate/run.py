"""What hit ratio a demand would meet in tiers of given sizes: by the engine's own index, without bytes or a device.

Request for request the same as an engine in a closed loop of one request, with `restore="load"`,
`write_back_idle_ms=0` and a host tier that is ready, in which nothing fails. What it leaves out are requests in flight
together and copies that take time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mtserve._core import _Simulation, _TraceOracle, oracle_policy_names
from mtserve.config import EngineConfig
from mtserve.trace.hits import hit_ratio, tiers_of
from mtserve.trace.schema import Progress, SmallInts
from mtserve.trace.simulate.demand import Demand

BLOCK = 1 << 17  # requests between two calls of `progress`


class TierCounters(NamedTuple):
    """One tier: its pages, those in use at the end and the users who have them, and what was evicted."""

    pages: int
    used_pages: int
    users: int
    evicted_pages: int
    evicted_users: int  # that lost their last page here
    pinned_users: int  # of those pinned, whom the budget covers at the end
    pinned_pages: int  # theirs


class SimulationCounters(NamedTuple):
    """What a simulation counted, loads and stores in times and in pages."""

    gpu: TierCounters
    host: TierCounters
    requests: int
    batches: int
    rebuilt: int  # new generations encoded in the background
    loads: int
    loaded_pages: int
    stores: int
    stored_pages: int
    unsaved_pages: int  # evicted from the GPU with states that the host did not have


class BatchLimits(NamedTuple):
    """What one batch takes, as the fields of `EngineConfig`: of a cold prefix that lacks more, each is given a part."""

    max_batch_tokens: int = EngineConfig.max_batch_tokens
    cold_batch_tokens: int = EngineConfig.cold_batch_tokens
    cold_after: int = EngineConfig.cold_after


DEFAULT_LIMITS = BatchLimits()


@dataclass(frozen=True, eq=False)
class SimulatedRun:
    """Where each of N requests found its prefix: int32 [N] tokens; what neither tier had was encoded."""

    prefix_tokens: SmallInts
    gpu_tokens: SmallInts
    host_tokens: SmallInts
    counters: SimulationCounters

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """[N] all of them: a simulation fails none."""
        return np.ones(len(self.prefix_tokens), dtype=np.bool_)

    @property
    def tier(self) -> npt.NDArray[np.int8]:
        """int8 [N] slowest tier of each request, an index into `mtserve.trace.hits.TIER_NAMES`."""
        return tiers_of(self.gpu_tokens, self.host_tokens)

    @property
    def hit_ratio(self) -> dict[str, dict[str, float]]:
        """By request and by token, per tier and in total, as in the summary of a replay."""
        return hit_ratio(self)

    def hit_ratio_among(self, among: npt.NDArray[np.bool_]) -> dict[str, dict[str, float]]:
        """The same of the requests that `among`, bool [N], picks."""
        return hit_ratio(self, among)


def simulate(
    demand: Demand,
    *,
    policy: str,
    gpu_pages: int,
    host_pages: int,
    page_tokens: int,
    limits: BatchLimits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> SimulatedRun:
    """Send `demand` through tiers that start empty; `host_pages=0`: no host tier.

    policy: one of `mtserve._core.policy_names()`, or of `oracle_policy_names()`, which know the demand's future: no engine
    can serve under those, others are measured against them. `limits` matter for long prefixes only. The demand's `pins` are
    set before the first request.
    Raises InvalidArgument for what an index or a tier refuses, ResourceExhausted for more pins than an index takes.
    """
    habits, keys, next_s = None, demand.keys, None
    if policy in oracle_policy_names():
        habits, keys, next_s = _TraceOracle(demand.user.astype(np.uint64), demand.t_s), None, demand.next_s()
    budget = EngineConfig.pin_budget if demand.pins is None else demand.pins.budget
    simulation = _Simulation(page_tokens, gpu_pages, host_pages, policy, *limits, budget, demand.users, keys, habits)
    if demand.pins is not None:
        simulation.pin(demand.pins.numbers)
    gpu, host = (np.empty(demand.requests, dtype=np.int32) for _ in range(2))
    for part in _blocks(demand.requests):
        coming = None if next_s is None else next_s[part]
        simulation.run(demand.t_s[part], demand.counts(part), gpu[part], host[part], coming)
        if progress is not None:
            progress(part.stop, demand.requests)
    of_gpu, of_host, *rest = simulation.stats()
    counters = SimulationCounters(TierCounters(*of_gpu), TierCounters(*of_host), *rest)
    return SimulatedRun(demand.tokens, gpu, host, counters)


def _blocks(requests: int) -> Iterator[slice]:
    for first in range(0, requests, BLOCK):
        yield slice(first, min(first + BLOCK, requests))
