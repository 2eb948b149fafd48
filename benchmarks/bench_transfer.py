"""Moving states between host and GPU: the movers alone, beside a running forward, and what a host hit costs a batch.

    python benchmarks/bench_transfer.py [--only alone|beside|hit] [--out FILE]

Pages are 1 MiB: 64 tokens of 8 layers x (K, V) x 4 heads x 128 in bf16. "engine" is the mover that the engine uses;
the others are what it is compared with: one plain copy of as many bytes, a copy a page, and a kernel on 4 or 16 blocks
that reads (or writes) pinned memory itself. Rates are bytes over the time from the submission to the end as the host
sees it, medians; every byte is compared before anything is reported. Beside: a captured hstu-512 forward (B8 L4096
new128 N256) runs again and again while copies keep the link busy. Hit: one batch of 8 users x 4096 tokens that only
the host has, through `Engine`, against its own transfer and its own compute.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from arguments import make_parser, require_gpu, write_report
from transfer_beside import measure_beside
from transfer_hit import measure_hit
from transfer_ways import KINDS, LONG, PAGES, SHAPE, Places, Tiers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.cache.index import Copy  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.transfer.mover import LOAD, runs  # noqa: E402

ROUNDS = 7
MIXED = [4096] * 8 + [700] * 252 + [50] * 252


def measure_way(tiers: Tiers, name: str, kinds: tuple[str, ...], copies: dict[str, list[Copy]]) -> dict[str, float]:
    """GB/s each way and ms of CPU for the submission, medians."""
    way, seconds, cpu = tiers.ways[name], [], []
    size = sum(len(copy.gpu_pages) for copy in copies[kinds[0]]) * SHAPE.bytes
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        waits = [way(kind, copies[kind]) for kind in kinds]
        cpu.append(time.perf_counter() - began)
        for wait in waits:
            wait()
        seconds.append(time.perf_counter() - began)
    return {"gb_per_s": size / statistics.median(seconds) / 1e9, "submit_ms": 1e3 * statistics.median(cpu)}


def check_way(tiers: Tiers, name: str, kind: str, copies: list[Copy]) -> None:
    """Exits unless every byte of the pages, and of no other, is where it belongs."""
    pool = tiers.pool.view(torch.int64).view(PAGES, -1)
    inside, outside = tiers.ids(copies)
    pool.random_()
    arena = tiers.arena_on_device()
    expected = pool.clone() if kind == LOAD else arena.clone()
    if kind == LOAD:
        expected[inside] = arena[outside]
    else:
        expected[outside] = pool[inside]
    torch.cuda.synchronize()
    tiers.ways[name](kind, copies)()
    torch.cuda.synchronize()
    if not torch.equal(pool if kind == LOAD else tiers.arena_on_device(), expected):
        sys.exit(f"{name}, {kind}: bytes differ; no report")


def measure_alone(tiers: Tiers, seed: int) -> dict[str, Any]:
    """Each way, each direction and both at once, for pages as the engine places them and for pages all apart."""
    report: dict[str, Any] = {}
    for layout in ("as allocated", "every page apart"):
        for label, tokens in (("8 users x 4096 tokens", LONG), ("512 users, 50, 700 and 4096 tokens", MIXED)):
            places = Places(layout, seed)
            copies = {kind: places.copies(kind, tokens) for kind in KINDS}
            case = report.setdefault(label, {}).setdefault(layout, {})
            case["pages"] = sum(len(copy.gpu_pages) for copy in copies[LOAD])
            case["mean_piece_pages"] = case["pages"] / sum(
                len(runs(copy.gpu_pages, copy.host_pages)[0]) for copy in copies[LOAD]
            )
            for name in tiers.ways:
                if name != "one plain copy":
                    for kind in KINDS:
                        check_way(tiers, name, kind, copies[kind])
                rates = {kind: measure_way(tiers, name, (kind,), copies) for kind in KINDS}
                rates["both"] = measure_way(tiers, name, KINDS, copies)
                case[name] = rates
                line = "  ".join(f"{kind} {each['gb_per_s']:.1f}" for kind, each in rates.items())
                print(
                    f"{label}, {layout}: {name:<18} {line} GB/s  (submit {rates[LOAD]['submit_ms']:.2f} ms)", flush=True
                )
    return report


def main() -> int:
    parser = make_parser(__doc__, "transfer.json", seed=True)
    parser.add_argument("--only", choices=("alone", "beside", "hit"))
    options = parser.parse_args()
    require_gpu()
    report: dict[str, Any] = {"stamp": stamp(seed=options.seed, device="cuda:0"), "page_bytes": SHAPE.bytes}
    if options.only in (None, "hit"):
        report["hit"] = measure_hit(options.seed)
    if options.only != "hit":
        tiers = Tiers()
        report["pinning"] = {"bytes": tiers.arena.bytes, "seconds": tiers.pinning_s}
        if options.only in (None, "alone"):
            report["alone"] = measure_alone(tiers, options.seed)
        if options.only in (None, "beside"):
            report["beside"] = measure_beside(tiers, options.seed)
        tiers.arena.close()
    write_report(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
