"""What a GPU tier is worth that has room for fewer users than are in flight. Virtual time: needs no GPU, and tells of none.

    python benchmarks/bench_small_pools.py

The engine's own loop answers traces with 8 requests in flight, on the clock, device and link of virtual_device.py: rates of an
H200 from mtserve/restore/gpus.py for hstu-512. "off": without a cache. "all wait": an engine whose requests wait for room
in the order of arrival, whatever that costs. "engine": as it is. Each figure is the mean of the seeds, by which the loop's
and the clients' times are drawn. `batch_ms` is what the loop takes for a batch, however small: 0.46 as calibrated, on captured
graphs; 1.0 as in replays of a second, where few are captured yet.

Of EB-NeRD an H200 answered MEASURED times as many requests as without a cache when all waited, which says how far these
figures can be trusted. They leave out what batches of many sizes cost until their graphs are captured. Who is slower with a
cache than without by more than NOISE is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_replay import ebnerd_trace  # noqa: E402
from virtual_device import JITTER, VirtualMachine  # noqa: E402
from virtual_replay import CLIENT_S, VirtualReplay, all_wait, small_states  # noqa: E402
from virtual_replay import replay as virtual_replay  # noqa: E402

from mtserve import provenance  # noqa: E402
from mtserve.cli.console import Phases  # noqa: E402
from mtserve.config import EngineConfig  # noqa: E402
from mtserve.restore.gpus import gpu_figures  # noqa: E402
from mtserve.trace.generator.config import GeneratorConfig  # noqa: E402
from mtserve.trace.generator.synthesis import generate  # noqa: E402
from mtserve.trace.hits import hit_ratio  # noqa: E402
from mtserve.trace.io import read_trace  # noqa: E402
from mtserve.trace.replay.features import TraceRows  # noqa: E402
from mtserve.trace.replay.runs import size_tiers  # noqa: E402
from mtserve.trace.schema import Trace  # noqa: E402

MODEL, GPU, IN_FLIGHT = "hstu-512", "h200", 8
SHARES = ("5%ws", "10%ws", "25%ws", "50%ws", "100%ws")
OFF, WAIT, ENGINE = "off", "all wait", "engine"
MEASURED = {"10%ws": 0.61, "25%ws": 0.48, "50%ws": 1.06, "100%ws": 1.27}
NOISE = 0.02


@dataclass(frozen=True)
class Setting:
    """A trace and how it is answered; no `generated`: the EB-NeRD trace."""

    generated: GeneratorConfig | None = None
    batch_ms: float | None = None  # None: as calibrated
    restore: str = "auto"


SHORT = {"history_median": 250, "history_max": 2000, "activity_sigma": 0.5}
SETTINGS = {
    "EB-NeRD": Setting(),
    "EB-NeRD, 1 ms a batch": Setting(batch_ms=1.0),
    "EB-NeRD, recompute": Setting(restore="recompute"),
    "40 users, short histories": Setting(GeneratorConfig(users=40, requests=2000, **SHORT)),
    "40 users": Setting(GeneratorConfig(users=40, requests=2000)),
    "160 users": Setting(GeneratorConfig(users=160, requests=2000)),
    "200 users": Setting(GeneratorConfig(users=200, requests=2000)),
    "40 users, load": Setting(GeneratorConfig(users=40, requests=2000), restore="load"),
    "160 users, load": Setting(GeneratorConfig(users=160, requests=2000), restore="load"),
}


def trace_of(setting: Setting) -> Trace | None:
    """None where it is not here."""
    if setting.generated is not None:
        return generate(setting.generated)
    path = ebnerd_trace()
    return None if path is None else read_trace(path)


def run(rows: TraceRows, setting: Setting, share: str, way: str, seed: int) -> VirtualReplay:
    model = small_states(MODEL)
    batch_s = None if setting.batch_ms is None else setting.batch_ms / 1e3
    config = EngineConfig(device="cpu", dtype="bfloat16", restore=setting.restore)
    machine = VirtualMachine.of(gpu_figures(GPU), MODEL, config.page_tokens, batch_s)
    if way == OFF:
        config = replace(config, cache="off")
    else:
        _, config = size_tiers(rows, model, replace(config, gpu_cache=share, host_cache="100%ws"))
    with all_wait() if way == WAIT else nullcontext():
        return virtual_replay(rows, model, config, machine, in_flight=IN_FLIGHT, seed=seed)


def summary(replays: list[VirtualReplay]) -> dict[str, Any]:
    """Means over the seeds; `requests_per_s` also the least and the most."""
    rates = [each.log.throughput_rps for each in replays]
    found = [hit_ratio(each.log)["token"] for each in replays]
    latency = [each.log.latency_ms() for each in replays]
    return {
        "requests_per_s": {"mean": mean(rates), "least": min(rates), "most": max(rates)},
        "users_a_batch": mean(each.users_a_batch for each in replays),
        "spare_share": mean(each.spare_share for each in replays),
        "found": {tier: mean(each[tier] for each in found) for tier in ("gpu", "host", "total")},
        "latency_ms": {name: mean(each[name] for each in latency) for name in ("p50", "p99")},
    }


def cells(rows: TraceRows, setting: Setting, seeds: int) -> list[dict[str, Any]]:
    """One for each way and share, "off" first."""
    todo = [(OFF, "")] + [(way, share) for share in SHARES for way in (WAIT, ENGINE)]
    found = []
    for way, share in todo:
        cell = summary([run(rows, setting, share, way, seed) for seed in range(seeds)])
        found.append({"way": way, "gpu_cache": share, **cell})
        cell["requests_per_s"]["to_off"] = cell["requests_per_s"]["mean"] / found[0]["requests_per_s"]["mean"]
    return found


def line(name: str, cell: dict[str, Any]) -> str:
    rate, found, latency = cell["requests_per_s"], cell["found"], cell["latency_ms"]
    return (
        f"{name:<26} {cell['gpu_cache']:<7} {cell['way']:<9} {rate['mean']:>6.0f} {rate['least']:>6.0f} {rate['most']:>6.0f} "
        f"{rate['to_off']:>6.2f} {cell['users_a_batch']:>6.2f} {100 * cell['spare_share']:>6.1f} "
        f"{100 * found['gpu']:>6.1f}/{100 * found['host']:<5.1f} {latency['p50']:>6.2f} {latency['p99']:>6.1f}"
    )


def slower(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The engine's cells that are slower than no cache at all, by more than chance."""
    return [
        f"{name} {cell['gpu_cache']}"
        for name, found in results.items()
        for cell in found
        if cell["way"] == ENGINE and cell["requests_per_s"]["to_off"] < 1 - NOISE
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="settings whose names contain this")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "small_pools.json")
    args = parser.parse_args()
    wanted = {name: setting for name, setting in SETTINGS.items() if (args.only or "") in name}
    results: dict[str, list[dict[str, Any]]] = {}
    print("virtual time: no figure here was measured on a GPU")
    print(
        f"{'trace':<26} {'gpu':<7} {'way':<9} {'req/s':>6} {'least':>6} {'most':>6} {'to off':>6} {'users':>6} "
        f"{'spare%':>6} {'tokens gpu/host':>12} {'p50':>6} {'p99 ms':>6}"
    )
    with Phases() as phases:
        for done, (name, setting) in enumerate(wanted.items(), 1):
            trace = trace_of(setting)
            if trace is None:
                print(f"{name}: the trace is not here")
                continue
            results[name] = cells(TraceRows(trace, small_states(MODEL).schema), setting, args.seeds)
            print("\n".join(line(name, cell) for cell in results[name]), flush=True)
            phases("traces", done, len(wanted))
    behind = slower(results)
    print(f"slower than without a cache: {', '.join(behind) or 'none'}")
    report = {
        "benchmark": "small_pools",
        "time": "virtual: rates of a GPU as fitted, no GPU was used",
        "model": MODEL,
        "gpu_figures": GPU,
        "in_flight": IN_FLIGHT,
        "client_s": CLIENT_S,
        "jitter": JITTER,
        "seeds": args.seeds,
        "ebnerd_measured_to_off": MEASURED,
        "slower": behind,
        "cells": results,
        **provenance.stamp(seed=0),
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
