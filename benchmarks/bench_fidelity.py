"""How far a simulation is from the engine that it stands for: hit ratios of both, one request at a time, eight, and as they come.

    python benchmarks/bench_fidelity.py

The engine runs on the CPU with a tiny model, whose histories are never cut: what is found does not depend on its weights, and
new generations, which an engine encodes between two requests of a user, would have no time for that in a replay. One request
at a time must give the same, token by token, or nothing is reported; with more in flight users share the device and the
link at once, which a simulation leaves out, and the difference is what this tells.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arguments import make_parser, write_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtserve import provenance
from mtserve.cli.console import Phases
from mtserve.config import EngineConfig
from mtserve.model.presets import default_schema, preset
from mtserve.model.ranking import RankingModel
from mtserve.model.weights import initialise
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.hits import hit_ratio
from mtserve.trace.replay.config import ReplayConfig
from mtserve.trace.replay.features import TraceRows
from mtserve.trace.replay.runs import replay
from mtserve.trace.schema import Trace
from mtserve.trace.simulate.demand import demand_of
from mtserve.trace.simulate.run import SimulatedRun, simulate
from mtserve.trace.working_set import working_set_pages

TRACE = GeneratorConfig(users=300, requests=2000, history_median=120, history_max=400, candidates_mean=4, items=5000)
ENGINE = EngineConfig(
    device="cpu", page_tokens=16, restore="load", write_back_idle_ms=0, host_pinning="wait", max_batch_requests=16
)
CELLS = [(gpu, host) for gpu in (5, 10) for host in (0, 50, 100)]  # % of the working set
OPEN_RPS = 100  # in the mean: a fraction of what one core answers
LOADS = {"one at a time": {"concurrency": 1}, "eight at a time": {"concurrency": 8}, "as they come": {"speed": 0.0}}


def simulated(trace: Trace, model: RankingModel, pages: int, gpu: int, host: int) -> SimulatedRun:
    sizes = {"gpu_pages": max(1, -(-pages * gpu // 100)), "host_pages": -(-pages * host // 100)}
    demand = demand_of(trace, model.config, len(model.schema.user))
    return simulate(demand, policy=ENGINE.policy, page_tokens=ENGINE.page_tokens, **sizes)


def compare(trace: Trace, model: RankingModel, phases: Phases) -> list[dict[str, Any]]:
    rows = TraceRows(trace, model.schema)
    pages = working_set_pages(
        trace.user, rows.final_positions(), model.config, len(model.schema.user), ENGINE.page_tokens
    )
    speed = OPEN_RPS * (trace.t_ms[-1] - trace.t_ms[0]) / 1000 / trace.requests
    found = []
    for gpu, host in CELLS:
        run = simulated(trace, model, pages, gpu, host)
        expected = run.hit_ratio["token"]
        cell: dict[str, Any] = {"gpu_percent": gpu, "host_percent": host, "simulated": expected}
        engine = replace(ENGINE, gpu_cache=f"{gpu}%ws", host_cache=f"{host}%ws" if host else "0")
        for name, load in LOADS.items():
            options = ReplayConfig(
                baseline_requests=0, verify=0, **{**load, **({"speed": speed} if "speed" in load else {})}
            )
            log = replay(trace, model, engine, options, phases).cached
            if name == "one at a time" and not np.array_equal(log.gpu_tokens, run.gpu_tokens):
                sys.exit(f"gpu {gpu}%, host {host}%: the engine found other tokens than the simulation; no report")
            token = hit_ratio(log)["token"]
            cell[name] = {tier: 100 * (token[tier] - expected[tier]) for tier in token}  # points
        found.append(cell)
    return found


def main() -> None:
    args = make_parser(__doc__, "fidelity.json").parse_args()
    config = replace(
        preset("tiny"), static_history=False, static_attention="causal", max_history=2000, max_realtime=2000
    )
    model = initialise(RankingModel(config, default_schema(item_buckets=1000, dim=16)), seed=0)
    with Phases() as phases:
        trace = generate(TRACE, lambda done, total: phases("generating requests", done, total))
        cells = compare(trace, model, phases)
    for cell in cells:
        apart = {name: f"{cell[name]['gpu']:+.2f} / {cell[name]['total']:+.2f}" for name in LOADS}
        print(
            f"gpu {cell['gpu_percent']}%, host {cell['host_percent']}%: {cell['simulated']}, engine in points: {apart}"
        )
    report = {"benchmark": "fidelity", "requests_per_s": OPEN_RPS, "cells": cells, **provenance.stamp(seed=TRACE.seed)}
    write_report(report, args.out)


if __name__ == "__main__":
    main()
