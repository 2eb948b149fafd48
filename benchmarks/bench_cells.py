"""What `mtserve simulate` says of one generated trace: the README's example. No figure depends on the machine.

    python benchmarks/bench_cells.py

Before anything is reported, every cell is held to what must be so: nothing above the optimum, LRU no worse with more memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtserve import provenance
from mtserve.cli.console import Phases
from mtserve.config import EngineConfig
from mtserve.model.presets import default_schema, preset
from mtserve.trace.generator import GeneratorConfig, generate
from mtserve.trace.simulate_config import SimulateConfig
from mtserve.trace.simulate_summary import summarise_cells, summarise_sizing
from mtserve.trace.study import study

MODEL = "hstu-1024"
TRACE = GeneratorConfig(users=20_000, requests=400_000, candidates_mean=8.0, days=14)
CONFIG = SimulateConfig(
    policy="lru,s3fifo,gdsf,locality", gpu_cache="2%,5%,10%,25%", host_cache="0,50%", sample_users=8192
)
ROUNDING = 1e-12


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cells.json")
    args = parser.parse_args()
    with Phases() as phases:
        trace = generate(TRACE, lambda done, total: phases("generating requests", done, total))
        user_tokens = len(default_schema().user)
        found = study(trace, preset(MODEL), user_tokens, EngineConfig(), CONFIG, progress=phases)
    cells = summarise_cells(found)
    check(cells)
    assert found.sizing is not None
    report = {
        "benchmark": "cells",
        "users": TRACE.users,
        "cells": cells,
        "sizing": summarise_sizing(found.sizing),
        **provenance.stamp(seed=TRACE.seed),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{args.out}: {len(cells)} cells")


if __name__ == "__main__":
    main()
