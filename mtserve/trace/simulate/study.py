"""One trace against many caches: all cells, their forecasts, and how much memory a target takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import torch

from mtserve.config import EngineConfig, ModelConfig
from mtserve.engine.setup import DTYPES, page_shape
from mtserve.engine.tiers.footprint import Footprint, packed_format
from mtserve.errors import InvalidArgument
from mtserve.restore.costs import Costs
from mtserve.restore.gpus import GpuFigures, gpu_figures
from mtserve.trace.schema import Trace
from mtserve.trace.simulate.capacities import split_list
from mtserve.trace.simulate.cells import CellResult, Tiers, grid, run_cells
from mtserve.trace.simulate.config import POLICIES, SimulateConfig
from mtserve.trace.simulate.demand import Demand, demand_of
from mtserve.trace.simulate.forecast import Asked
from mtserve.trace.simulate.machine import Machine
from mtserve.trace.simulate.miss_ratio import Curve, curves, sampling_error
from mtserve.trace.simulate.optimum import OPTIMUM
from mtserve.trace.simulate.pins import Pins
from mtserve.trace.simulate.rounds import Rounds
from mtserve.trace.simulate.run import BatchLimits
from mtserve.trace.simulate.sampling import draw

MAX_CELLS = 1024
Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total)."""


@dataclass(frozen=True)
class Sizing:
    """What memory gives: `curves` of the policies and of the optimum, for one tier of pages of `page_bytes`.

    From `users` of the trace, `share` of its pages. `lru_error`: mean difference of LRU's curve from that of everybody,
    as a hit ratio.
    """

    curves: list[Curve]
    page_bytes: int
    users: int
    share: float
    lru_error: float


@dataclass(frozen=True)
class Pinned:
    """Users who were named to be pinned: those who ask, those whom the trace does not know.

    `working_set_bytes`: of the final states of those who ask. `budget`: what share of each tier may be kept for them.
    """

    named: int
    asking: int
    unknown: int
    working_set_bytes: int
    budget: float


@dataclass(frozen=True)
class Study:
    """A trace, the model and engine it is for, and what came of it.

    `pinned` is None where nobody is, `sizing` where none was asked for.
    """

    trace: Trace
    model: ModelConfig
    engine: EngineConfig
    config: SimulateConfig
    machine: str
    working_set_bytes: int
    pinned: Pinned | None
    cells: list[CellResult]
    sizing: Sizing | None


def study(
    trace: Trace,
    model: ModelConfig,
    user_tokens: int,
    engine: EngineConfig,
    config: SimulateConfig,
    costs: Costs | None = None,
    progress: Progress = lambda phase, done, total: None,
    pin: Sequence[str] = (),
) -> Study:
    """Simulate `trace` on every policy and size that `config` names, for a model of `user_tokens` U features.

    engine: page size, formats, batches and budget of pins; its own capacities and policy do not count, and its dtype "auto" is bfloat16.
    costs: as an engine has measured them, in place of the figures of the GPU that `config` names. pin: ids of users who are
    pinned, known to the trace or not.
    Raises InvalidArgument naming the option that is at fault.
    """
    policies, sizes = _policies(config), _sizes(config, trace)
    dtype = DTYPES["bfloat16" if engine.dtype == "auto" else engine.dtype]
    figures = _figures(config, dtype) if costs is None else costs
    demand = demand_of(trace, model, user_tokens)
    if pin:
        demand = replace(demand, pins=Pins.of(trace.user_ids, pin, engine.pin_budget))
    working_set = demand.working_set_pages(engine.page_tokens)
    tiers = {host: _tiers(model, engine, dtype, figures, host=host) for host in (False, True)}
    cells = grid(policies, sizes, tiers, working_set)
    rounds = Rounds(config.threads)
    limits = BatchLimits(engine.max_batch_tokens, engine.cold_batch_tokens, engine.cold_after)
    asked = Asked.of(demand, engine)
    results = run_cells(cells, demand, asked, engine.page_tokens, limits, rounds, progress)
    sizing = None
    if config.curves:
        sample = draw(demand, config, engine.page_tokens)
        found = curves(
            list(dict.fromkeys([*policies, OPTIMUM])), sample, demand, engine.page_tokens, limits, rounds,
            partial(progress, "miss-ratio curves"),
        )  # fmt: skip
        error = 0.0 if sample.share == 1.0 else sampling_error(sample, demand, engine.page_tokens)
        sizing = Sizing(found, tiers[False].gpu_page_bytes, sample.demand.users, sample.share, error)
    page_bytes = page_shape(model, engine, dtype).bytes
    return Study(
        trace, model, engine, config, figures.name if isinstance(figures, GpuFigures) else "measured costs",
        working_set * page_bytes, _pinned(demand, engine.page_tokens, page_bytes), results, sizing,
    )  # fmt: skip


def _pinned(demand: Demand, page_tokens: int, page_bytes: int) -> Pinned | None:
    pins = demand.pins
    if pins is None:
        return None
    return Pinned(
        named=int(pins.users.sum()) + pins.unknown,
        asking=int(pins.users[np.unique(demand.user)].sum()),
        unknown=pins.unknown,
        working_set_bytes=demand.working_set_pages(page_tokens, pins.users) * page_bytes,
        budget=pins.budget,
    )


def _policies(config: SimulateConfig) -> list[str]:
    policies = split_list(config.policy, "policy")
    for policy in policies:
        if policy not in POLICIES:
            raise InvalidArgument(f"{policy!r} is not one of {', '.join(POLICIES)}", field="policy")
    return policies


def _sizes(config: SimulateConfig, trace: Trace) -> list[tuple[str, str]]:
    """(GPU, host) of each cell, as texts."""
    if not trace.requests:
        raise InvalidArgument("the trace has no request", field="trace")
    sizes = list(product(split_list(config.gpu_cache, "gpu_cache"), split_list(config.host_cache, "host_cache")))
    cells = len(sizes) * len(split_list(config.policy, "policy"))
    if cells > MAX_CELLS:
        raise InvalidArgument(f"{cells} cells are more than {MAX_CELLS}", field="gpu_cache")
    return sizes


def _figures(config: SimulateConfig, dtype: torch.dtype) -> GpuFigures:
    if dtype == torch.float32:
        raise InvalidArgument("figures of GPUs are for states of 16 bits; give costs that were measured", field="dtype")
    return gpu_figures(config.gpu)


def _tiers(
    model: ModelConfig, engine: EngineConfig, dtype: torch.dtype, figures: GpuFigures | Costs, *, host: bool
) -> Tiers:
    """Without a host tier nothing is kept in its format."""
    engine = replace(engine, host_cache="1" if host else "0")
    states = page_shape(model, engine, dtype)
    footprint = Footprint.of(states, packed_format(model, engine, states))
    return Tiers(footprint.gpu, footprint.host, Machine.of(model, engine, dtype, figures))
