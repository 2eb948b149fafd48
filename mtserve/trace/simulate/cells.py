"""Every policy in every size of both tiers: one simulation a cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.trace.hits import asked_before
from mtserve.trace.schema import Progress
from mtserve.trace.simulate.capacities import Capacity, capacity
from mtserve.trace.simulate.demand import Demand
from mtserve.trace.simulate.forecast import Asked, Forecast, forecast
from mtserve.trace.simulate.machine import Machine
from mtserve.trace.simulate.optimum import optimum
from mtserve.trace.simulate.rounds import Rounds
from mtserve.trace.simulate.run import BatchLimits, SimulatedRun, SimulationCounters, simulate
from mtserve.trace.simulate.sampling import most_pages

BINS = 60


@dataclass(frozen=True)
class Tiers:
    """Bytes of a page in each tier, and the machine that has them."""

    gpu_page_bytes: int
    host_page_bytes: int
    machine: Machine


@dataclass(frozen=True)
class Cell:
    """What one simulation is of, and the machine that foretells its times."""

    policy: str
    gpu: Capacity
    host: Capacity
    machine: Machine


@dataclass(frozen=True)
class CellResult:
    """What one simulation found out; ratios as replays define them.

    `hit_ratio_by_pin`: of the requests of "pinned" users and of "others"; None where nobody is pinned.
    `gpu_users`: prefixes of the mean request that the GPU tier holds. `over_time`: token hit ratio of each of up to BINS
    equal parts of the trace. `optimum`: that of a tier of both sizes together which knows the future: no policy with these
    tiers finds more in all.
    """

    cell: Cell
    hit_ratio: Mapping[str, Mapping[str, float]]
    hit_ratio_after_first: Mapping[str, Mapping[str, float]]
    hit_ratio_by_pin: Mapping[str, Mapping[str, Mapping[str, float]]] | None
    counters: SimulationCounters
    gpu_users: float
    over_time: tuple[float, ...]
    optimum: float
    forecast: Forecast

    @property
    def loaded_bytes(self) -> int:
        """Bytes that came from the host."""
        return self.counters.loaded_pages * self.cell.machine.link_page_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes that went there."""
        return self.counters.stored_pages * self.cell.machine.link_page_bytes


def grid(
    policies: Sequence[str], sizes: Iterable[tuple[str, str]], tiers: Mapping[bool, Tiers], working_set: int
) -> list[Cell]:
    """Cells of all `policies` in all `sizes` (GPU, host) as texts; `tiers` without a host tier (False) and with one.

    Raises InvalidArgument naming the tier whose size is none, or which holds nothing though it is not 0.
    """
    cells = []
    for (gpu_text, host_text), policy in product(sizes, policies):
        host = capacity(host_text, working_set, tiers[True].host_page_bytes, "host_cache")
        of = tiers[host.pages > 0]
        gpu = capacity(gpu_text, working_set, of.gpu_page_bytes, "gpu_cache")
        if not gpu.pages:
            raise InvalidArgument("the GPU tier needs a page", field="gpu_cache")
        cells.append(Cell(policy, gpu, host, of.machine))
    return cells


def run_cells(
    cells: Sequence[Cell], demand: Demand, asked: Asked, page_tokens: int, limits: BatchLimits, rounds: Rounds,
    progress: Callable[[str, int, int], None],
) -> list[CellResult]:  # fmt: skip
    """The results of `cells`, in their order. progress: called with (phase, requests simulated, of all cells)."""
    repeats = asked_before(demand.user)
    # A tier twice as large as all states never evicts; policies set memory aside for as many pages as it has.
    enough = 2 * int(most_pages(demand, page_tokens).sum())
    sizes = sorted({cell.gpu.pages + cell.host.pages for cell in cells})
    bounds = [partial(_optimum, min(pages, enough), demand, page_tokens) for pages in sizes]
    best = dict(zip(sizes, rounds.run(bounds, demand.requests, partial(progress, "optimum")), strict=True))
    jobs = [
        partial(
            _result, cell, best[cell.gpu.pages + cell.host.pages], enough, demand, repeats, asked, page_tokens, limits
        )
        for cell in cells
    ]
    return rounds.run(jobs, demand.requests, partial(progress, "requests simulated"))


def _optimum(pages: int, demand: Demand, page_tokens: int, progress: Progress) -> float:
    found = int(optimum(demand, pages, page_tokens).sum(dtype=np.int64))
    progress(demand.requests, demand.requests)
    return found / max(1, int(demand.tokens.sum(dtype=np.int64)))


def _result(
    cell: Cell, best: float, enough: int, demand: Demand, repeats: npt.NDArray[np.bool_], asked: Asked, page_tokens: int,
    limits: BatchLimits, progress: Progress,
) -> CellResult:  # fmt: skip
    run = simulate(
        demand, policy=cell.policy, gpu_pages=min(cell.gpu.pages, enough), host_pages=min(cell.host.pages, enough), page_tokens=page_tokens,
        limits=limits, progress=progress,
    )  # fmt: skip
    return CellResult(
        cell=cell,
        hit_ratio=run.hit_ratio,
        hit_ratio_after_first=run.hit_ratio_among(repeats),
        hit_ratio_by_pin=_by_pin(run, demand),
        counters=run.counters,
        gpu_users=cell.gpu.pages * page_tokens / max(1.0, float(demand.tokens.mean())),
        over_time=_over_time(run, demand),
        optimum=best,
        forecast=forecast(cell.machine, asked, cell.gpu.pages, run.gpu_tokens, run.host_tokens),
    )


def _by_pin(run: SimulatedRun, demand: Demand) -> dict[str, dict[str, dict[str, float]]] | None:
    if demand.pins is None:
        return None
    pinned = demand.pins.users[demand.user]
    return {"pinned": run.hit_ratio_among(pinned), "others": run.hit_ratio_among(~pinned)}


def _over_time(run: SimulatedRun, demand: Demand) -> tuple[float, ...]:
    bins = min(BINS, demand.requests)
    place = np.arange(demand.requests) * bins // demand.requests
    found = np.bincount(place, weights=run.gpu_tokens.astype(np.int64) + run.host_tokens)
    return tuple((found / np.maximum(1, np.bincount(place, weights=demand.tokens))).tolist())
