"""Hit ratios of all replacement policies on one tier, beside what knowing the future would reach.

    python benchmarks/bench_replacement.py [--plot benchmarks/results/replacement.png]

Users ask as those of the trace generator do; the tiers are simulated by the engine's own index (mtserve/trace/simulate/run.py),
for `kuairand`, which cuts histories at 20,000. The GPU tier holds 5, 10, 25 or 50% of the working set, the sum of all
users' last pages; there is no host tier. The hit ratio is by token: tokens found of all prefix tokens. Of the parameter
sets, three are about all users (how long their pauses are, how their histories grow) and three about users who differ:
`groups` are those that the generator has names for; `habits` differ far more, in activity 25 times; `events` adds flash
crowds, bursts and newcomers to `groups`. The real EB-NeRD trace is among them where it is at hand (bench_replay.py says where).

What policies are measured against: `optimum` knows all requests and may also keep nothing of one, so nothing finds more
pages; `belady` knows them, too, but holds what it served, as a tier does; `gap-oracle` knows from the whole trace how
each user comes back, but for the gap under way. Where a policy finds more pages than the optimum there is no report; of
tokens it may find a few more, as a history's last page has fewer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from arguments import make_parser, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_replay import ebnerd_trace  # noqa: E402

from mtserve._core import oracle_policy_names, policy_names  # noqa: E402
from mtserve.config import EngineConfig  # noqa: E402
from mtserve.model.presets import default_schema, preset  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.trace.generator.bursts import BurstConfig  # noqa: E402
from mtserve.trace.generator.config import GeneratorConfig  # noqa: E402
from mtserve.trace.generator.crowds import CrowdConfig  # noqa: E402
from mtserve.trace.generator.newcomers import NewcomerConfig  # noqa: E402
from mtserve.trace.generator.synthesis import outline  # noqa: E402
from mtserve.trace.io import read_trace  # noqa: E402
from mtserve.trace.schema import SmallInts  # noqa: E402
from mtserve.trace.simulate.demand import Demand, demand_of  # noqa: E402
from mtserve.trace.simulate.optimum import optimum  # noqa: E402
from mtserve.trace.simulate.run import simulate  # noqa: E402

PAGE_TOKENS = EngineConfig.page_tokens
MODEL = "kuairand"
SHARES = (0.05, 0.10, 0.25, 0.50)
CEILINGS = (*oracle_policy_names(), "optimum")
LEAST_GAIN = 0.02  # points: of less there is no share to speak of
WITHIN = 0.2  # points of the best policy that serves

GROUPS = "heavy casual night"
# Shares of users, requests as a multiple of the mean, pauses inside a session likewise, hours by which the day is later.
HABITS = (
    "hourly:share=0.1,activity=5,history=1.5,gap=0.5 rare:share=0.4,activity=0.2,history=0.6,gap=3 "
    "late:share=0.15,later=12 long:share=0.15,activity=0.5,history=3,gap=2,later=6"
)
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "long gaps": {"days": 14, "long_gap_hours": 24.0, "activity_sigma": 1.4},
    "growth": {"history_median": 200, "candidates_mean": 20.0, "clicks_mean": 10.0},
    "groups": {"groups": GROUPS},
    "habits": {"groups": HABITS, "days": 14},
    "events": {
        "groups": GROUPS,
        "days": 14,
        "bursts": BurstConfig(like="code"),
        "crowds": CrowdConfig(events=14, users=0.1, load=3.0),
        "newcomers": NewcomerConfig(share=0.3),
    },
}
"""Knobs of the generator; those not named are its own."""


def demand_for(name: str, seed: int, users: int, requests: int) -> Demand:
    """Of one of CASES, or of the trace file `name`."""
    user_tokens = len(default_schema().user)
    if name not in CASES:
        return demand_of(read_trace(Path(name)), preset(MODEL), user_tokens)
    drawn = outline(GeneratorConfig(seed=seed, users=users, requests=requests, **CASES[name]))
    return demand_of(drawn, preset(MODEL), user_tokens)


def found(demand: Demand, policy: str, pages: int) -> SmallInts:
    """int32 [N] prefix tokens that each request finds."""
    if policy == "optimum":
        return optimum(demand, pages, PAGE_TOKENS)
    return simulate(demand, policy=policy, gpu_pages=pages, host_pages=0, page_tokens=PAGE_TOKENS).gpu_tokens


def in_all(tokens: SmallInts) -> tuple[int, int]:
    """(tokens, pages that hold them)."""
    return int(tokens.sum(dtype=np.int64)), int((-(-tokens // PAGE_TOKENS)).sum(dtype=np.int64))


def measure(name: str, seed: int, users: int, requests: int) -> dict[str, Any]:
    """Every policy at every capacity, on one trace. Exits where a policy finds what cannot be found."""
    demand = demand_for(name, seed, users, requests)
    total, pages = int(demand.tokens.sum(dtype=np.int64)), demand.working_set_pages(PAGE_TOKENS)
    cells = []
    for share in SHARES:
        capacity = max(1, int(pages * share))
        start = time.process_time()
        finds = {each: in_all(found(demand, each, capacity)) for each in (*policy_names(), *CEILINGS)}
        for each, (_, of_pages) in finds.items():
            if of_pages > finds["optimum"][1]:
                raise SystemExit(f"{each} finds more pages than the optimum of {name} at {share:.0%}; no report")
        ratios = {each: tokens / total * 100 for each, (tokens, _) in finds.items()}
        online = {each: ratios[each] for each in policy_names()}
        cells.append(
            {
                "share": share,
                "pages": capacity,
                "token_hit_percent": ratios,
                "best_online": max(online, key=online.__getitem__),
                "cpu_seconds": round(time.process_time() - start, 1),
            }
        )
    return {
        "trace": name if name in CASES else "EB-NeRD",
        "seed": seed,
        "users": demand.users,
        "requests": demand.requests,
        "working_set_pages": pages,
        "cells": cells,
    }


def reached(cells: Iterable[dict[str, Any]], ceiling: str) -> float | None:
    """Of what the ceiling gains over LRU in these cells together, the share that locality gains; None where that is too little."""
    ratios = [cell["token_hit_percent"] for cell in cells]
    possible = sum(each[ceiling] - each["lru"] for each in ratios)
    if possible < LEAST_GAIN * len(ratios):
        return None
    return round(sum(each["locality"] - each["lru"] for each in ratios) / possible, 3)


def behind_best(row: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """By how many points locality is behind the best policy that serves; below 0 it is ahead of the best other."""
    ratios = {name: cell["token_hit_percent"][name] for name in policy_names()}
    mine = ratios.pop("locality")
    best = max(ratios, key=ratios.__getitem__)
    return {
        "trace": row["trace"],
        "seed": row["seed"],
        "share": cell["share"],
        "best_other": best,
        "points": round(ratios[best] - mine, 3),
    }


def all_reached(cells: list[dict[str, Any]]) -> dict[str, float | None]:
    return {f"of {ceiling}": reached(cells, ceiling) for ceiling in CEILINGS}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cells = [cell for row in rows for cell in row["cells"]]
    behind = [behind_best(row, cell) for row in rows for cell in row["cells"]]
    names = sorted({row["trace"] for row in rows})
    return {
        "reached_by_trace": {
            name: all_reached([cell for row in rows if row["trace"] == name for cell in row["cells"]]) for name in names
        },
        "reached_by_share": {
            f"{share:.0%}": all_reached([cell for cell in cells if cell["share"] == share]) for share in SHARES
        },
        "reached": all_reached(cells),
        "behind_the_best": {
            "most_points": max(each["points"] for each in behind),
            "target_points": WITHIN,
            "beyond_target": [each for each in behind if each["points"] > WITHIN],
            "cells_ahead_of_all_others": sum(each["points"] < 0 for each in behind),
            "cells": len(cells),
        },
    }


def mean_ratios(rows: list[dict[str, Any]], trace: str, share: float) -> dict[str, float]:
    """Percent by policy, the mean over the seeds."""
    ratios = [
        cell["token_hit_percent"]
        for row in rows
        if row["trace"] == trace
        for cell in row["cells"]
        if cell["share"] == share
    ]
    return {name: float(np.mean([each[name] for each in ratios])) for name in ratios[0]}


def table(rows: list[dict[str, Any]]) -> str:
    names = (*policy_names(), *CEILINGS)
    lines = [f"{'token hit ratio, %':<20}" + "".join(f"{name:>11}" for name in names)]
    for trace in sorted({row["trace"] for row in rows}):
        for share in SHARES:
            ratios = mean_ratios(rows, trace, share)
            lines.append(f"{trace + f' {share:.0%}':<20}" + "".join(f"{ratios[name]:>11.2f}" for name in names))
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Points over LRU of every policy: those near it, and all with the ceilings, one column a trace."""
    from matplotlib.figure import Figure

    rows = report["results"]
    traces = sorted({row["trace"] for row in rows})
    figure = Figure(figsize=(3.4 * len(traces), 6.4), layout="constrained")
    grid = figure.subplots(2, len(traces), sharex=True, squeeze=False)
    for column, trace in enumerate(traces):
        gains = [mean_ratios(rows, trace, share) for share in SHARES]
        for name in (*policy_names(), *CEILINGS):
            style = "--" if name in CEILINGS else "-"
            points = [each[name] - each["lru"] for each in gains]
            for axes in grid[:, column]:
                axes.plot(
                    range(len(SHARES)), points, style, marker=".", lw=2.4 if name == "locality" else 1.2, label=name
                )
        near = max(0.1, *(abs(each[name] - each["lru"]) for each in gains for name in ("locality", "gap-oracle")))
        grid[0][column].set_ylim(-1.2 * near, 1.2 * near)
        grid[1][column].set_ylim(bottom=-10)
        grid[0][column].set_title(trace)
        grid[1][column].set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
        grid[1][column].set_xlabel("tier, of the working set")
    for axes in grid[:, 0]:
        axes.set_ylabel("token hit ratio over LRU's, points")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) // 2, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = make_parser(__doc__, "replacement.json")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=2_000_000)
    parser.add_argument("--seeds", type=int, default=2, help="traces of each parameter set")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="draw the table as PNG")
    args = parser.parse_args()
    if not (10 <= args.users <= 10_000_000 and args.users <= args.requests <= 100_000_000 and 1 <= args.seeds <= 100):
        parser.error("needs 10 <= users <= 10,000,000, users <= requests <= 100,000,000 and 1 <= seeds <= 100")
    jobs = [(name, seed, args.users, args.requests) for name in CASES for seed in range(args.seeds)]
    path = ebnerd_trace()
    if path is None:
        print("the EB-NeRD trace is not here; only generated ones are replayed", flush=True)
    else:
        jobs.append((str(path), 0, 0, 0))
    rows = []
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(measure, *job) for job in jobs]):
            rows.append(done.result())
            row = rows[-1]
            seconds = sum(cell["cpu_seconds"] for cell in row["cells"])
            print(f"{len(rows)} of {len(jobs)}: {row['trace']}, seed {row['seed']}, {seconds:.0f} s", flush=True)
    rows.sort(key=lambda row: (row["trace"], row["seed"]))
    report = {
        "benchmark": "replacement",
        "model": MODEL,
        "page_tokens": PAGE_TOKENS,
        "summary": summary(rows),
        "results": rows,
        "stamp": stamp(seed=0),
    }
    write_report(report, args.out)
    print(table(rows))
    print(json.dumps(report["summary"], indent=2))
    if args.plot:
        draw(report, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
