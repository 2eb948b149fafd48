"""Time and memory of simulating the tiers, with each replacement policy: what one core does in a second.

Users are drawn from a Zipf-like law; their histories are lognormal, grow by clicks with every request, and begin a new
generation now and then, which an engine would encode in the background. The tiers hold 5% and 20% of the working set,
so that most requests load, evict and store. Every structure is walked by its own check afterwards; a simulation that
breaks gets no report. A request's time is that of the processor, which others may share. Memory is what the process has grown by, the demand itself not included. The hit ratios are those
of this stream, which no user's habit repeats: they tell nothing of a product's trace.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from arguments import make_parser, write_report
from bench_policies import resident_bytes, zipf_stream

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtserve import provenance
from mtserve._core import _Simulation, policy_names
from mtserve.config import EngineConfig
from mtserve.trace.csr import earlier_in_group
from mtserve.trace.simulate.demand import Demand
from mtserve.trace.simulate.run import BatchLimits

PAGE_TOKENS = 32
CLICKS = 3  # tokens that each request adds
GENERATION_REQUESTS = 64  # of a user
MEDIAN_TOKENS, SIGMA_TOKENS, MAX_TOKENS = 1000, 1.0, 20_000
GPU_SHARE, HOST_SHARE = 0.05, 0.2
BLOCK = 1 << 17
TARGET_S = 20.0
REQUESTS, USERS = 5_000_000, 200_000
MANY_USERS = 10_000_000


def make_demand(requests: int, users: int, skew: float, seed: int) -> Demand:
    rng = np.random.default_rng(seed)
    user = zipf_stream(rng, users, skew, requests)
    lengths = np.minimum(MEDIAN_TOKENS * np.exp(SIGMA_TOKENS * rng.standard_normal(users)), MAX_TOKENS).astype(np.int32)
    asked = earlier_in_group(user, np.ones(requests, np.int64)).astype(np.int32)

    def tokens(asked: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return lengths[user] + CLICKS * (asked % GENERATION_REQUESTS)

    candidates, nothing = np.full(requests, 100, np.int32), np.zeros(requests, np.int32)
    return Demand(
        users, user, np.arange(requests) / 100, candidates, tokens(asked), asked // GENERATION_REQUESTS, nothing,
        tokens(asked + 1), (asked + 1) // GENERATION_REQUESTS, nothing,
    )  # fmt: skip


def measure(policy: str, requests: int, users: int, skew: float, seed: int) -> dict[str, Any]:
    """One simulation. Raises CorruptState where it breaks, SystemExit where the tiers stay empty."""
    demand = make_demand(requests, users, skew, seed)
    pages = demand.working_set_pages(PAGE_TOKENS)
    gpu, host = np.zeros(requests, np.int32), np.zeros(requests, np.int32)
    gpu += 1  # backs its memory before that is measured
    host += 1
    before = resident_bytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    gpu_pages, host_pages = int(pages * GPU_SHARE), int(pages * HOST_SHARE)
    simulation = _Simulation(
        PAGE_TOKENS, gpu_pages, host_pages, policy, *BatchLimits(), EngineConfig.pin_budget, users, None, None
    )
    for first in range(0, requests, BLOCK):
        part = slice(first, first + BLOCK)
        simulation.run(demand.t_s[part], demand.counts(part), gpu[part], host[part], None)
        print(f"\r{policy}: {min(first + BLOCK, requests):,} of {requests:,} requests", end="", file=sys.stderr)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    print(file=sys.stderr)
    grown = resident_bytes() - before
    simulation.check()
    tier = simulation.stats()[0]
    if tier[1] < tier[0] * 0.99:
        raise SystemExit(f"{policy}: {tier[1]} of {tier[0]} pages are used; no report")
    wanted = int(demand.tokens.sum(dtype=np.int64))
    return {
        "policy": policy,
        "requests": requests,
        "users": users,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_s, 2),
        "requests_per_cpu_s": round(requests / cpu_s),
        "cpu_us_per_request": round(cpu_s / requests * 1e6, 3),
        "bytes_per_user": round(grown / users, 1),
        "users_held": simulation.stats()[1][2],
        "token_hit_ratio_gpu": round(int(gpu.sum(dtype=np.int64)) / wanted, 4),
        "token_hit_ratio_host": round(int(host.sum(dtype=np.int64)) / wanted, 4),
    }


def measure_alone(policy: str, requests: int, users: int, arguments: list[str]) -> dict[str, Any]:
    """In a process of its own, where what was allocated before cannot be reused."""
    sizes = ["--requests", str(requests), "--users", str(users)]
    command = [sys.executable, __file__, *arguments, *sizes, "--only", policy]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{policy}: failed; no report")
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def main() -> None:
    parser = make_parser(__doc__, "simulate.json", seed=True)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--many-users", type=int, default=MANY_USERS, help="one more row with so many, under lru")
    parser.add_argument("--skew", type=float, default=0.8, help="exponent of the law of popularity")
    parser.add_argument("--only", choices=policy_names(), help="print one policy's row, write nothing")
    args = parser.parse_args()
    if not 1000 <= args.requests <= 100_000_000 or not 1000 <= min(args.users, args.many_users) <= 100_000_000:
        parser.error("needs 1,000 to 100,000,000 requests and users")
    if args.only:
        print(json.dumps(measure(args.only, args.requests, args.users, args.skew, args.seed)))
        return
    given = ["--skew", str(args.skew), "--seed", str(args.seed)]
    rows = [measure_alone(name, args.requests, args.users, given) for name in policy_names()]
    many = measure_alone("lru", max(args.requests, 2 * args.many_users), args.many_users, given)
    report = {
        "benchmark": "simulate",
        "skew": args.skew,
        "page_tokens": PAGE_TOKENS,
        "median_tokens": MEDIAN_TOKENS,
        "gpu_share_of_working_set": GPU_SHARE,
        "host_share_of_working_set": HOST_SHARE,
        "target_s": TARGET_S,
        "within_target": all(row["seconds"] <= TARGET_S for row in rows),
        "results": rows,
        "many_users": many,
        **provenance.stamp(seed=args.seed),
    }
    write_report(report, args.out)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
