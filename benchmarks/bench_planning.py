"""Planning time of one warm batch: chain-verified lookups, begin_batch and end_batch, evictions included.

The index also knows many other users, and its GPU pool is full, so every new page is taken
from somebody. Each batch appends a page of behaviours to each of its users. Before anything is
timed the same steps run once with their results checked; a wrong result means no report.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from arguments import make_parser, write_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtserve import provenance
from mtserve.cache.index import TieredIndex
from mtserve.cache.keys import extend_chain
from mtserve.types import Chain

PAGE_TOKENS = 64
HISTORY = 4096
OTHERS_TOKENS = 64
DELTA = 64
GROUPS = 8  # disjoint batches, cycled through, so that a batch's data is not still in the nearest cache
ROUNDS = 40
WIDTH = HISTORY // PAGE_TOKENS + ROUNDS * 2 + 2


class Plan:
    """The output buffers of one batch, as a planner would keep them."""

    def __init__(self, batch: int) -> None:
        self.cached: npt.NDArray[np.int32] = np.zeros(batch, np.int32)
        self.stored: npt.NDArray[np.int32] = np.zeros(batch, np.int32)
        self.page_table: npt.NDArray[np.int32] = np.zeros((batch, WIDTH), np.int32)


def chains_of(count: int, tokens: int, rng: np.random.Generator) -> list[Chain]:
    """`count` chains of `tokens` random behaviours of 32 bytes."""
    rows = rng.integers(0, 1 << 62, (tokens, 4))
    chains = np.zeros((count, tokens), np.uint64)
    for i in range(count):
        extend_chain(chains[i], rows, int(rng.integers(1 << 62)))
    return list(chains)


def fill(index: TieredIndex, users: list[str], chains: list[Chain], batch: int) -> None:
    for start in range(0, len(users), batch):
        part = slice(start, start + batch)
        plan = Plan(len(users[part]))
        index.end_batch(index.begin_batch(users[part], chains[part], plan.cached, plan.stored, plan.page_table), True)


def plan_batch(index: TieredIndex, users: list[str], chains: list[Chain], plan: Plan) -> tuple[float, float, float]:
    """Seconds of the lookups, of begin_batch and of end_batch."""
    start = time.perf_counter()
    for user, chain in zip(users, chains, strict=True):
        index.lookup(user, chain)
    looked = time.perf_counter()
    ticket = index.begin_batch(users, chains, plan.cached, plan.stored, plan.page_table)
    begun = time.perf_counter()
    index.end_batch(ticket, True)
    return looked - start, begun - looked, time.perf_counter() - begun


def verify(index: TieredIndex, users: list[str], chains: list[Chain], expected: int) -> None:
    """One checked pass over a batch whose users have `expected` tokens cached. Raises SystemExit on any surprise."""
    plan, before = Plan(len(users)), index.stats()
    for user, chain in zip(users, chains, strict=True):
        if index.lookup(user, chain).gpu_tokens != expected:
            raise SystemExit(f"{user}: lookup does not find its {expected} tokens; no report")
    plan_batch(index, users, chains, plan)
    tokens = len(chains[0])
    pages = plan.page_table[:, : -(-tokens // PAGE_TOKENS)]
    evicted = index.stats().gpu.evicted_pages - before.gpu.evicted_pages
    needed = len(users) * (-(-tokens // PAGE_TOKENS) - -(-expected // PAGE_TOKENS)) - before.gpu.free
    right = (plan.cached == expected).all() and (plan.stored == tokens).all()
    if not right or len(np.unique(pages)) != pages.size or pages.min() < 0 or evicted != max(needed, 0):
        raise SystemExit("begin_batch planned wrongly; no report")
    index.check()


def measure(others: int, batch: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    warm = batch * GROUPS
    names = [f"warm-{i}" for i in range(warm)]
    chains = chains_of(warm, HISTORY + (ROUNDS + 1) * DELTA, rng)
    pool = warm * HISTORY // PAGE_TOKENS + others * OTHERS_TOKENS // PAGE_TOKENS
    index = TieredIndex(PAGE_TOKENS, pool, 1024)
    fill(index, [f"other-{i}" for i in rng.permutation(others)], chains_of(others, OTHERS_TOKENS, rng), 1024)
    fill(index, names, [chain[:HISTORY] for chain in chains], batch)
    groups = [slice(start, start + batch) for start in range(0, warm, batch)]
    for group in groups:
        verify(index, names[group], [chain[: HISTORY + DELTA] for chain in chains[group]], HISTORY)
    plan, times = Plan(batch), []
    evicted = index.stats().gpu.evicted_pages
    for turn in range(1, ROUNDS + 1):
        for group in groups:
            now = [chain[: HISTORY + (turn + 1) * DELTA] for chain in chains[group]]
            times.append(plan_batch(index, names[group], now, plan))
    evicted = index.stats().gpu.evicted_pages - evicted
    if evicted != len(times) * batch * DELTA // PAGE_TOKENS:
        raise SystemExit(f"{evicted} pages evicted while timing, not one per user and batch; no report")
    index.check()
    return summarise(times)


def summarise(times: list[tuple[float, float, float]]) -> dict[str, float]:
    lookup, begin, end = zip(*times, strict=True)
    total = [sum(parts) for parts in times]
    return {
        "lookup_median_us": round(statistics.median(lookup) * 1e6, 2),
        "begin_batch_median_us": round(statistics.median(begin) * 1e6, 2),
        "end_batch_median_us": round(statistics.median(end) * 1e6, 2),
        "batch_median_us": round(statistics.median(total) * 1e6, 2),
        "batch_p99_us": round(statistics.quantiles(total, n=100)[98] * 1e6, 2),
        "samples": len(times),
    }


def main() -> None:
    parser = make_parser(__doc__, "planning.json", seed=True)
    parser.add_argument("--users", type=int, default=100_000, help="other users in the index")
    parser.add_argument("--batch", type=int, default=32, help="users of a batch")
    args = parser.parse_args()
    needed = args.batch * GROUPS * (ROUNDS + 1) * DELTA // PAGE_TOKENS
    if not 1 <= args.batch <= 1024 or args.users * OTHERS_TOKENS // PAGE_TOKENS < needed:
        parser.error(f"needs 1 <= batch <= 1024 and at least {needed} other users to take pages from")
    report = {
        "benchmark": "planning",
        "other_users": args.users,
        "batch_users": args.batch,
        "first_history_tokens": HISTORY + 2 * DELTA,
        "last_history_tokens": HISTORY + (ROUNDS + 1) * DELTA,
        "new_tokens_per_user": DELTA,
        "page_tokens": PAGE_TOKENS,
        "evicted_pages_per_batch": args.batch * DELTA // PAGE_TOKENS,
        **measure(args.users, args.batch, args.seed),
        **provenance.stamp(seed=args.seed),
    }
    write_report(report, args.out)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
