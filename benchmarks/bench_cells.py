"""What `mtserve simulate` says of generated traces: the README's example. No figure depends on the machine.

    python benchmarks/bench_cells.py

The operating point: what both tiers find together with a GPU tier of a tenth of the working set and all of it on the host,
for more and more requests of the same users. First requests find nothing, so the ratio in all rises with their number.

Before anything is reported, every cell is held to what must be so: nothing above the optimum, LRU no worse with more memory.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from arguments import make_parser, write_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtserve import provenance
from mtserve.cli.console import Phases
from mtserve.config import EngineConfig
from mtserve.model.presets import default_schema, preset
from mtserve.trace.calibration import KUAIRAND
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate, outline
from mtserve.trace.hits import asked_before
from mtserve.trace.simulate.config import SimulateConfig
from mtserve.trace.simulate.demand import demand_of
from mtserve.trace.simulate.run import simulate
from mtserve.trace.simulate.study import study
from mtserve.trace.simulate.summary import summarise_cells, summarise_sizing

MODEL = "hstu-1024"
TRACE = GeneratorConfig(users=20_000, requests=400_000, candidates_mean=8.0, days=14)
CONFIG = SimulateConfig(
    policy="lru,s3fifo,gdsf,locality", gpu_cache="2%,5%,10%,25%", host_cache="0,50%", sample_users=8192
)
ROUNDING = 1e-12
DENSE = round(20_000 * 7 * KUAIRAND["requests_per_user_and_day"])
OPERATING = [GeneratorConfig(users=20_000, requests=count) for count in (400_000, 2_000_000, 4_000_000, DENSE)]
GPU_SHARE, HOST_SHARE, POLICY = 0.1, 1.0, "lru"
TARGET = 0.995  # of the prefix tokens, at the published density


def check(cells: list[dict[str, Any]]) -> None:
    """Exits when a cell cannot be."""
    for cell in cells:
        if cell["hit_ratio"]["token"]["total"] > cell["optimum_token_hit_ratio"] + ROUNDING:
            sys.exit(f"{cell['policy']} at {cell['gpu_cache']} finds more than the optimum; no report")
    for host in {cell["host_cache"] for cell in cells}:
        alike = [cell for cell in cells if (cell["policy"], cell["host_cache"]) == ("lru", host)]
        for less, more in pairwise(cell["hit_ratio"]["token"]["total"] for cell in alike):
            if more < less - ROUNDING:
                sys.exit(f"lru with host {host} finds less with more memory; no report")


def operate(config: GeneratorConfig) -> dict[str, Any]:
    """What both tiers find of one trace."""
    page_tokens = EngineConfig.page_tokens
    demand = demand_of(outline(config), preset(MODEL), len(default_schema().user))
    pages, again = demand.working_set_pages(page_tokens), asked_before(demand.user)
    run = simulate(
        demand,
        policy=POLICY,
        gpu_pages=int(GPU_SHARE * pages),
        host_pages=int(HOST_SHARE * pages),
        page_tokens=page_tokens,
    )
    return {
        "requests": demand.requests,
        "token": run.hit_ratio["token"],
        "token_after_first": run.hit_ratio_among(again)["token"],
        "first_share": float(demand.tokens[~again].sum(dtype=np.int64) / demand.tokens.sum(dtype=np.int64)),
    }


def operating_point(phases: Phases) -> dict[str, Any]:
    """Exits where the densest trace finds less than the target."""
    rows = []
    for done, config in enumerate(OPERATING, 1):
        rows.append(operate(config))
        phases("operating point", done, len(OPERATING))
    if rows[-1]["token"]["total"] < TARGET:
        sys.exit(
            f"both tiers find {rows[-1]['token']['total']:.2%} of the prefix tokens, below {TARGET:.1%}; no report"
        )
    return {
        "model": MODEL,
        "users": OPERATING[0].users,
        "days": OPERATING[0].days,
        "gpu_share": GPU_SHARE,
        "host_share": HOST_SHARE,
        "policy": POLICY,
        "target": TARGET,
        "rows": rows,
    }


def main() -> None:
    args = make_parser(__doc__, "cells.json").parse_args()
    with Phases() as phases:
        trace = generate(TRACE, lambda done, total: phases("generating requests", done, total))
        user_tokens = len(default_schema().user)
        found = study(trace, preset(MODEL), user_tokens, EngineConfig(), CONFIG, progress=phases)
        operating = operating_point(phases)
    cells = summarise_cells(found)
    check(cells)
    assert found.sizing is not None
    report = {
        "benchmark": "cells",
        "users": TRACE.users,
        "cells": cells,
        "operating_point": operating,
        "sizing": summarise_sizing(found.sizing),
        **provenance.stamp(seed=TRACE.seed),
    }
    write_report(report, args.out)
    print(f"{args.out}: {len(cells)} cells")


if __name__ == "__main__":
    main()
