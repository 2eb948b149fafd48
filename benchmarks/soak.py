"""Replays under chaos for a given time, each with other sizes and faults, every score held against a full recompute.

    python benchmarks/soak.py --minutes 60                      CPU: every score against the fp32 reference
    python benchmarks/soak.py --minutes 10 --device cuda        GPU: every score against an engine without a cache,
                                                                a sample against the fp32 reference

Each round draws a trace, the sizes of both tiers, how states come back, when they are saved, and which share of the copies
fails or is late; the seed of a round that failed repeats it. A round fails when a score is wrong, a request
is lost, a page or copy is left in flight, or a structure is inconsistent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.config import EngineConfig  # noqa: E402
from mtserve.model.presets import build  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.trace.generator.config import GeneratorConfig  # noqa: E402
from mtserve.trace.generator.synthesis import generate  # noqa: E402
from mtserve.trace.replay.config import ReplayConfig  # noqa: E402
from mtserve.trace.replay.runs import ReplayResult, replay  # noqa: E402

# Of any score. Roundings in bf16 make up to 0.017, in fp8 0.056 (of 105 random models), states of another history several
# tenths.
LARGEST_ERROR = {"kv": 0.05, "kv8": 0.05, "x8": 0.05, "x4": 0.16, "fp8": 0.1}
FORMATS = (("native", "kv"), ("native", "kv"), ("native", "kv8"), ("native", "x8"), ("native", "x4"), ("fp8", "kv"))
COUNTED = (
    "loads_total", "stores_total", "loads_failed_total", "stores_failed_total", "loads_declined_total",
    "batches_over_loads_total", "write_backs_deferred_total", "evicted_unsaved_pages_total", "batches_total",
)  # fmt: skip


def trace_of(draw: random.Random, seed: int, *, cuda: bool) -> GeneratorConfig:
    """Many users for the tiers that follow; short histories on the CPU, where the reference is the check."""
    return GeneratorConfig(
        seed=seed,
        users=draw.choice((20, 60, 150) if cuda else (8, 20, 40)),
        requests=1000 if cuda else 300,
        history_median=draw.choice((150, 700, 2000) if cuda else (20, 60, 120)),
        history_max=6000 if cuda else 400,
        candidates_mean=draw.choice((6.0, 100.0)) if cuda else 6.0,
    )


def engine_of(draw: random.Random, seed: int, *, cuda: bool) -> EngineConfig:
    """Tiers too small, copies that fail or are late, and every way to bring states back and to save them."""
    fail, slow, late_ms = draw.choice((0, 0.02, 0.2)), draw.choice((0, 0.05, 0.3)), draw.choice((1, 5, 20))
    gpu_format, host_format = draw.choice(FORMATS)
    return EngineConfig(
        device="cuda" if cuda else "cpu",
        gpu_cache=draw.choice(("8%ws", "20%ws", "50%ws")),
        host_cache=draw.choice(("0", "4%ws", "50%ws", "120%ws")),
        restore=draw.choice(("load", "auto", "auto")),
        gpu_format=gpu_format,
        host_format=host_format,
        graphs=draw.choice(("on", "ahead", "off")),
        deterministic=cuda and draw.random() < 0.2,
        write_back_idle_ms=draw.choice((0, 5, 100)),
        write_back_queue=draw.choice(("0", "10%", "1GiB")),
        max_batch_requests=draw.choice((4, 16, 64)),
        page_tokens=64 if cuda else draw.choice((4, 16, 64)),
        poison_pages=draw.random() < 0.5,
        chaos=f"fail={fail},slow={slow}:{late_ms}ms,seed={seed}",
    )


def run_round(seed: int, *, cuda: bool) -> dict[str, Any]:
    """One replay and what it found; `broken` has a line for each rule that did not hold."""
    draw = random.Random(seed)
    trace = generate(trace_of(draw, seed, cuda=cuda))
    engine = engine_of(draw, seed, cuda=cuda)
    model = build(draw.choice(("hstu-512", "mtgr-small")) if cuda else "tiny", seed=seed % 1000)
    config = ReplayConfig(
        concurrency=draw.choice((1, 8, 40)),
        baseline_requests=-1 if cuda else 0,
        verify=6 if cuda else trace.requests,
        verify_tokens=1500 if cuda else 65536,
        seed=seed,
    )
    result = replay(trace, model, engine, config)
    return {
        "seed": seed,
        "model": model.config.name,
        "format": format_of(engine),
        "chaos": engine.chaos,
        **outcome(result, cuda=cuda),
    }


def format_of(engine: EngineConfig) -> str:
    """That which rounds most."""
    return "fp8" if engine.gpu_format == "fp8" else engine.host_format


def outcome(result: ReplayResult, *, cuda: bool) -> dict[str, Any]:
    agreement, run = result.agreement, result.cached
    checked = agreement.compared if cuda else agreement.verified.cached
    broken = list(agreement.broken)
    if not checked.max_score <= LARGEST_ERROR[format_of(result.engine)]:
        broken.append(f"a score is {checked.max_score:.2g} from a full recompute's")
    if checked.requests != run.requests:
        broken.append(f"{run.requests} requests, {checked.requests} checked: {run.first_failure}")
    return {
        "requests": run.requests,
        "checked": checked.requests,
        "max_score_difference": checked.max_score,
        "relative_l2": checked.relative_l2,
        "broken": broken,
        **{name: run.counters[name] for name in COUNTED},
    }


def held_by_process() -> dict[str, int]:
    """Resident memory in MiB and open file descriptors; nothing where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"rss_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20, "open_files": len(os.listdir("/proc/self/fd"))}
    except OSError:
        return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; later ones count up")
    parser.add_argument("--rounds", type=int, default=0, help="end after so many rounds; 0: when the time is over")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/soak_DEVICE.json)")
    options = parser.parse_args()
    cuda, began, rounds = options.device == "cuda", time.monotonic(), []
    while not rounds or (time.monotonic() - began < 60 * options.minutes and len(rounds) != options.rounds):
        seed = options.seed + len(rounds)
        try:
            each = run_round(seed, cuda=cuda) | held_by_process()
        except Exception:
            print(f"seed {seed} failed", flush=True)
            raise
        rounds.append(each)
        print(json.dumps(each), flush=True)
        if each["broken"]:
            return 1
    totals = {name: sum(each[name] for each in rounds) for name in ("requests", "checked", *COUNTED)}
    # The first rounds load what is loaded once; medians, as rounds differ in size.
    held = {
        name: [statistics.median(each[name] for each in part) for part in (rounds[10:110], rounds[-100:])]
        for name in ("rss_mib", "open_files")
        if len(rounds) > 20 and name in rounds[0]
    }
    report = {
        "stamp": stamp(seed=options.seed, device="cuda:0" if cuda else "cpu"),
        "minutes": (time.monotonic() - began) / 60,
        "rounds": len(rounds),
        "totals": totals,
        "held_early_and_late": held,
        "broken": sum(len(each["broken"]) for each in rounds),
        "max_score_difference": max(each["max_score_difference"] for each in rounds),
        "largest_relative_l2": max(each["relative_l2"] for each in rounds),
    }
    print(json.dumps(report, indent=2))
    target = options.out or ROOT / "benchmarks" / "results" / f"soak_{options.device}.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
