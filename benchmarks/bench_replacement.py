"""Hit ratios of all replacement policies on one tier, beside what knowing the future would reach.

    python benchmarks/bench_replacement.py [--plot benchmarks/results/replacement.png]

Users ask in sessions, as those of the trace generator do; their histories grow by clicks and are cut at 20,000. A tier
holds 5, 10, 25 or 50% of the working set, the sum of all users' last pages, and takes from its victims their last pages,
only as many as are missing. The hit ratio is by token: tokens found of all prefix tokens. Three parameter sets and three
seeds, and the real EB-NeRD trace where it is at hand (bench_replay.py says where).

What policies are measured against: `optimum` knows all requests and may also keep nothing of one, so nothing finds more
pages; `belady` knows them, too, but holds what it served, as a tier does; `gap-oracle` knows from the whole trace how
each user comes back, but for the gap under way. Every policy is walked by its own check at the end of each replay; a
policy that breaks gets no report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_replay import ebnerd_trace  # noqa: E402

from mtserve._core import _optimum, _replay_trace, oracle_policy_names, policy_names  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.trace.arrivals import kuairand_pauses, request_times  # noqa: E402
from mtserve.trace.calibration import ACTIVITY_SIGMA, HISTORY_SIGMA, KUAIRAND  # noqa: E402
from mtserve.trace.csr import offsets_of  # noqa: E402
from mtserve.trace.io import read_trace  # noqa: E402

PAGE_TOKENS = 64
SHARES = (0.05, 0.10, 0.25, 0.50)
MAX_HISTORY = 20_000
HISTORY_ACTIVITY = 0.8  # correlation of history length and activity, both in the log
CEILINGS = (*oracle_policy_names(), "optimum")
LEAST_GAIN = 0.02  # points: of less there is no share to speak of
WITHIN = 0.2  # points of the best policy that serves

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Case:
    """Parameters of generated arrivals; those not named here are the generator's."""

    days: int
    long_gap_hours: float = 8.0
    activity_sigma: float = ACTIVITY_SIGMA
    history_median: float = KUAIRAND["clicks_per_user"]["p50"]
    candidates_mean: float = KUAIRAND["candidates_mean"]
    clicks_mean: float = KUAIRAND["clicks_mean"]


CASES = {
    "default": Case(days=7),
    "long gaps": Case(days=14, long_gap_hours=24.0, activity_sigma=1.4),
    "growth": Case(days=7, history_median=200, candidates_mean=20.0, clicks_mean=10.0),
}


@dataclass(frozen=True)
class Requests:
    """user int32 [N], below `users`; t_s float64 [N], ascending; tokens int32 [N] of the prefix that each wants."""

    user: Ints
    t_s: npt.NDArray[np.float64]
    tokens: Ints
    users: int

    @property
    def working_set_pages(self) -> int:
        last = np.zeros(self.users, np.int64)
        last[self.user] = self.tokens
        return int((-(-last // PAGE_TOKENS)).sum())

    def found(self, policy: str, capacity_pages: int) -> int:
        """Tokens found in all. Raises CorruptState where the policy breaks."""
        out = np.empty(len(self.user), np.int32)
        trace = (self.user, self.t_s, self.tokens, out, self.users, PAGE_TOKENS)
        if policy == "optimum":
            _optimum(capacity_pages, *trace)
        else:
            _replay_trace(policy, capacity_pages, *trace)
        return int(out.sum(dtype=np.int64))


def prefixes(user: Ints, clicks: npt.NDArray[Any], history: npt.NDArray[Any]) -> Ints:
    """int32 [N]: behaviours before each request, `history` [U] of them before the trace; 1 to MAX_HISTORY."""
    order = np.argsort(user, kind="stable")
    sums, users = offsets_of(clicks[order])[:-1], user[order]
    firsts = np.searchsorted(users, np.arange(len(history)))
    tokens = np.empty(len(user), np.int64)
    tokens[order] = sums - sums[np.minimum(firsts, len(sums) - 1)][users] + history[users]
    return np.clip(tokens, 1, MAX_HISTORY).astype(np.int32)


def generated(case: Case, seed: int, users: int, requests: int) -> Requests:
    rng = np.random.default_rng(np.random.SeedSequence([seed, users, requests]))
    z = rng.standard_normal(users)
    weights = np.exp(case.activity_sigma * z)
    counts = rng.multinomial(requests, weights / weights.sum())
    user, t_ms = request_times(rng, counts, case.days, kuairand_pauses(case.long_gap_hours * 3600))
    mixed = HISTORY_ACTIVITY * z + np.sqrt(1 - HISTORY_ACTIVITY**2) * rng.standard_normal(users)
    history = np.rint(case.history_median * np.exp(HISTORY_SIGMA * mixed)).astype(np.int64)
    candidates = rng.geometric(1 / case.candidates_mean, requests)
    clicks = rng.binomial(candidates, case.clicks_mean / case.candidates_mean)
    return Requests(user.astype(np.int32), t_ms / 1000, prefixes(user, clicks, history), users)


def real(path: Path) -> Requests:
    trace = read_trace(path)
    history, clicks = np.diff(trace.history_offsets), np.diff(trace.clicked_offsets)
    user = trace.user.astype(np.int32)
    t_s = (trace.t_ms - trace.t_ms[0]) / 1000
    return Requests(user, t_s, prefixes(user, clicks, history), len(trace.user_ids))


def measure(name: str, seed: int, users: int, requests: int) -> dict[str, Any]:
    """Every policy at every capacity, on one trace; `name` is one of CASES, or a trace file."""
    trace = generated(CASES[name], seed, users, requests) if name in CASES else real(Path(name))
    total, pages = int(trace.tokens.sum(dtype=np.int64)), trace.working_set_pages
    cells = []
    for share in SHARES:
        capacity = max(1, int(pages * share))
        start = time.perf_counter()
        ratios = {each: trace.found(each, capacity) / total * 100 for each in (*policy_names(), *CEILINGS)}
        cells.append(
            {
                "share": share,
                "pages": capacity,
                "token_hit_percent": ratios,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    label = name if name in CASES else "EB-NeRD"
    return {
        "trace": label,
        "seed": seed,
        "users": trace.users,
        "requests": len(trace.user),
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


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cells = [cell for row in rows for cell in row["cells"]]
    behind = [
        max(cell["token_hit_percent"][name] for name in policy_names()) - cell["token_hit_percent"]["locality"]
        for cell in cells
    ]
    names = sorted({row["trace"] for row in rows})
    return {
        "reached_by_trace": {
            name: {f"of {ceiling}": reached((c for row in rows if row["trace"] == name for c in row["cells"]), ceiling) for ceiling in CEILINGS}
            for name in names
        },
        "reached_by_share": {
            f"{share:.0%}": {f"of {ceiling}": reached((c for c in cells if c["share"] == share), ceiling) for ceiling in CEILINGS}
            for share in SHARES
        },
        "reached": {f"of {ceiling}": reached(cells, ceiling) for ceiling in CEILINGS},
        "behind_the_best_points": {"most": round(max(behind), 3), "target": WITHIN, "cells_best": sum(each <= 0 for each in behind), "cells": len(cells)},
    }  # fmt: skip


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=2_000_000)
    parser.add_argument("--seeds", type=int, default=3, help="traces of each parameter set")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "replacement.json")
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
            seconds = sum(cell["seconds"] for cell in row["cells"])
            print(f"{len(rows)} of {len(jobs)}: {row['trace']}, seed {row['seed']}, {seconds:.0f} s", flush=True)
    rows.sort(key=lambda row: (row["trace"], row["seed"]))
    report = {
        "benchmark": "replacement",
        "page_tokens": PAGE_TOKENS,
        "summary": summary(rows),
        "results": rows,
        "stamp": stamp(seed=0),
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(rows))
    print(json.dumps(report["summary"], indent=2))
    if args.plot:
        draw(report, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
