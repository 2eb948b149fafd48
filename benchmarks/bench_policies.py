"""Time of one decision of each replacement policy, on its own: a hit, or the victims that a newcomer needs and itself.

Requests are drawn from a Zipf-like law over many more users than the tier holds, each of one page, so that as many
users as the tier has pages are tracked. The users of the last requests are pinned, as those of batches and copies in
flight are. Every policy is walked by its own check before and after; a policy that breaks gets no report. Memory is
what the process has grown by, ghosts and tables included; it grows with the users of the tier, and is given for 10
million of them. Requests come a millisecond apart. The share of hits is that of this stream, which no user's
habit repeats: it tells nothing of a product's trace.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from arguments import make_parser, write_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtserve import provenance
from mtserve._core import _Policy, policy_names

USERS_PER_TRACKED = 4
WARM_UP = 6  # requests for each page of the tier before the clock runs
ROUNDS = 9
TARGET_NS = 300
EVERY_S = 1e-3
MANY_USERS = 10_000_000
TARGET_GB = 1.5  # for MANY_USERS


def zipf_stream(rng: np.random.Generator, users: int, skew: float, requests: int) -> npt.NDArray[np.int32]:
    """User numbers, int32 [requests]: the n-th most popular user with probability in proportion to n ** -skew."""
    share = np.cumsum(np.arange(1, users + 1, dtype=np.float64) ** -skew)
    ranks = np.searchsorted(share, rng.random(requests) * share[-1])
    return rng.permutation(users).astype(np.int32)[np.minimum(ranks, users - 1)]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, tracked: int, skew: float, pinned: int, seed: int) -> dict[str, float | str]:
    """One policy with `tracked` users in its tier. Raises CorruptState, or SystemExit where the tier is not full."""
    rng = np.random.default_rng(seed)
    users = tracked * USERS_PER_TRACKED
    stream = zipf_stream(rng, users, skew, tracked * WARM_UP + tracked * ROUNDS)
    pages = np.ones(users, np.int32)
    before = resident_bytes()
    policy = _Policy(name, tracked)
    policy.replay(stream[: tracked * WARM_UP], pages, pinned, 0.0, EVERY_S)
    policy.check()
    if len(policy) != tracked:
        raise SystemExit(f"{name}: {len(policy)} users tracked, not {tracked}; no report")
    grown = resident_bytes() - before - 4 * (users + tracked)  # less the replay's own tables
    times, hits = [], 0
    for number, part in enumerate(stream[tracked * WARM_UP :].reshape(ROUNDS, tracked)):
        start_s = (WARM_UP + number) * tracked * EVERY_S
        start = time.perf_counter()
        hits += policy.replay(part, pages, pinned, start_s, EVERY_S)
        times.append((time.perf_counter() - start) / tracked * 1e9)
    policy.check()
    median = statistics.median(times)
    return {
        "policy": name,
        "decision_median_ns": round(median, 1),
        "decision_slowest_round_ns": round(max(times), 1),
        "within_target": median <= TARGET_NS and grown / tracked * MANY_USERS <= TARGET_GB * 1e9,
        "bytes_per_entry": round(grown / tracked, 1),
        "gb_for_10_million": round(grown / tracked * MANY_USERS / 1e9, 2),
        "hit_share": round(hits / (tracked * ROUNDS), 4),
    }


def measure_alone(name: str, arguments: list[str]) -> dict[str, float | str]:
    """In a process of its own, where what was allocated before the policy cannot be reused by it."""
    command = [sys.executable, __file__, *arguments, "--only", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: failed; no report")
    row: dict[str, float | str] = json.loads(done.stdout)
    return row


def main() -> None:
    parser = make_parser(__doc__, "policies.json", seed=True)
    parser.add_argument("--tracked", type=int, default=1_000_000, help="users that the tier holds, of one page each")
    parser.add_argument("--skew", type=float, default=0.8, help="exponent of the law of popularity")
    parser.add_argument("--pinned", type=int, default=32, help="users of so many last requests are pinned")
    parser.add_argument("--only", choices=policy_names(), help="print one policy's row, write nothing")
    args = parser.parse_args()
    if not 1000 <= args.tracked <= 10_000_000 or not 0 <= args.pinned <= 100:
        parser.error("needs 1,000 <= tracked <= 10,000,000 and 0 <= pinned <= 100")
    if args.only:
        print(json.dumps(measure(args.only, args.tracked, args.skew, args.pinned, args.seed)))
        return
    given = {"tracked": args.tracked, "skew": args.skew, "pinned": args.pinned, "seed": args.seed}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    report = {
        "benchmark": "policies",
        "tracked": args.tracked,
        "users": args.tracked * USERS_PER_TRACKED,
        "skew": args.skew,
        "pinned": args.pinned,
        "rounds": ROUNDS,
        "every_s": EVERY_S,
        "target_ns": TARGET_NS,
        "target_gb_for_10_million": TARGET_GB,
        "results": [measure_alone(name, arguments) for name in policy_names()],
        **provenance.stamp(seed=args.seed),
    }
    write_report(report, args.out)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
