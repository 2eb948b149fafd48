"""The result of a replay as one JSON-able object; units are in the names."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.engine.stopwatch import PHASES
from mtserve.engine.tiers.transfers import DIRECTIONS
from mtserve.metrics import GROUPS
from mtserve.provenance import stamp
from mtserve.trace.hits import asked_before, hit_ratio
from mtserve.trace.meta import meta_to_dict
from mtserve.trace.replay.run_log import RunLog
from mtserve.trace.replay.runs import ReplayResult
from mtserve.trace.schema import Trace

DEFINITIONS = {
    "hit_ratio.request": "answered requests by the slowest tier that any of their prefix came from; total is gpu + host",
    "hit_ratio.token": "prefix tokens of answered requests by where they were found, of all their prefix tokens",
    "hit_ratio_after_first": "the same without each user's first request, which finds nothing: replay starts cold",
    "latency_ms": "closed loop: submission to answer; open loop: scheduled arrival to answer",
    "speedup": "closed loop: ratio of throughputs; open loop: ratio of median latencies (baseline / cached)",
    "padded_rows_share": "rows that the runner computed to fill its buckets, of all it computed; null where it never pads",
    "max_score_difference": "largest absolute difference of a score, cached against uncached, over all compared requests",
    "chaos": "faults asked for: which shares of the copies between the tiers fail or come late; null without",
    "working_set_bytes": "pages of the final states of all users who ask, after the model's cut of their histories",
    "time.loop": "seconds of the engine's loop by what it did: outside (between steps, mostly admitting requests), copies "
    "(index and mover, both ways), planning (choosing, laying out and launching batches), device (waiting for a batch), "
    "answers (publishing states and answering), idle (asleep); together wall_s, give or take a step at its end",
    "time.batches_s": "seconds in which some batch was under way; load_s, store_s: some copy from or to the host. They "
    "overlap one another and the phases of the loop",
    "time.load_gb_per_s": "10^9 bytes loaded a second of load_s; store_gb_per_s alike; null where none was under way",
    "time.load_wait_s": "by group of layers, over the batches begun while pages of theirs were on their way "
    "(batches_over_loads): seconds from a batch's start until the group's pages had come",
    "time.loads_declined": "prefixes encoded again because that was expected to be sooner than loading them",
    "time.write_backs_deferred": "times that copies to the host waited because too many were under way",
    "time.evicted_unsaved_pages": "pages evicted from the GPU with states that the host did not have",
}


def repeats(trace: Trace, requests: int) -> npt.NDArray[np.bool_]:
    """[requests] whether a request's user has asked before in this trace."""
    return asked_before(trace.user[:requests])


def summarise(result: ReplayResult) -> dict[str, Any]:
    """Everything that a replay found out, JSON-able."""
    cached, agreement = result.cached, result.agreement
    return {
        **stamp(seed=result.config.seed, device=result.device),
        "model": result.model.config.name,
        "dtype": result.dtype,
        "trace": {**meta_to_dict(result.trace.meta), "changes": dict(result.trace.meta.changes)},
        "requests": cached.requests,
        "users": len(np.unique(result.trace.user)),
        "loop": _loop(result),
        "chaos": result.engine.chaos or None,
        "hit_ratio": hit_ratio(cached),
        "hit_ratio_after_first": hit_ratio(cached, repeats(result.trace, cached.requests)),
        **_timing(cached),
        "baseline": None if result.baseline is None else _timing(result.baseline),
        "speedup": result.speedup,
        "speedup_of": "p50 latency" if result.open_loop else "throughput",
        "max_score_difference": agreement.compared.max_score,
        "agreement": {"holds": agreement.holds, **dataclasses.asdict(agreement)},
        "tokens": _tokens(result),
        "memory": _memory(result),
        "model_config": dataclasses.asdict(result.model.config),
        "engine_config": dataclasses.asdict(result.engine),
        "definitions": DEFINITIONS,
    }


def _loop(result: ReplayResult) -> dict[str, Any]:
    if result.open_loop:
        return {"mode": "open", "speed": result.config.speed}
    return {"mode": "closed", "concurrency": result.config.concurrency}


def _timing(run: RunLog) -> dict[str, Any]:
    return {
        "latency_ms": run.latency_ms(),
        "throughput_rps": run.throughput_rps,
        "wall_s": run.seconds,
        "answered": int(run.done.sum()),
        "of_requests": run.requests,
        "failures": dict(run.failures),
        "first_failure": run.first_failure,
        "batches": run.counters["batches_total"],
        "batch_tokens": run.counters["batch_tokens"],
        "padded_rows_share": _padded_rows_share(run),
        "time": time_spent(run),
    }


def _padded_rows_share(run: RunLog) -> float | None:
    if run.stats["runner"]["padded_rows_share"] is None:
        return None
    return float(run.counters["padded_rows"] / max(1.0, run.counters["rows"]))


def time_spent(run: RunLog) -> dict[str, Any]:
    """Where the time of a run went: seconds by phase of the loop, seconds with work under way, and what was put off."""
    counters = run.counters
    return {
        "wall_s": run.seconds,
        "loop": {phase: counters[f"loop_s_{phase}"] for phase in PHASES},
        "batches_s": counters["batches_s"],
        **{f"{kind}_s": counters[f"{kind}_s"] for kind in DIRECTIONS},
        **{f"{kind}_gb_per_s": _gb_per_s(counters, kind) for kind in DIRECTIONS},
        "batches": int(counters["batches_total"]),
        "batches_over_loads": int(counters["batches_over_loads_total"]),
        "load_wait_s": [counters[f"load_wait_s_{group}"] for group in GROUPS],
        "loads_declined": int(counters["loads_declined_total"]),
        "write_backs_deferred": int(counters["write_backs_deferred_total"]),
        "evicted_unsaved_pages": int(counters["evicted_unsaved_pages_total"]),
    }


def _gb_per_s(counters: dict[str, float], kind: str) -> float | None:
    seconds = counters[f"{kind}_s"]
    return counters[f"{kind}_bytes_total"] / seconds / 1e9 if seconds > 0 else None


def _tokens(result: ReplayResult) -> dict[str, int]:
    """Prefix tokens of the answered requests by where they were found."""
    cached = result.cached
    prefix, gpu, host = (
        int(column[cached.done].sum()) for column in (cached.prefix_tokens, cached.gpu_tokens, cached.host_tokens)
    )
    return {"prefix": prefix, "gpu": gpu, "host": host, "encoded": prefix - gpu - host}


def _memory(result: ReplayResult) -> dict[str, Any]:
    cached = result.cached
    page_bytes, counters, tiers = cached.stats["page_bytes"], cached.counters, cached.stats["tiers"]
    facts: dict[str, Any] = {
        "working_set_bytes": result.working_set_bytes,
        "page_bytes": page_bytes,
        "page_tokens": cached.stats["page_tokens"],
        "load_bytes": counters["load_bytes_total"],
        "store_bytes": counters["store_bytes_total"],
        "loads": counters["loads_total"],
        "stores": counters["stores_total"],
        "loads_failed": counters["loads_failed_total"],
        "stores_failed": counters["stores_failed_total"],
        "copies_failed": counters["loads_failed_total"] + counters["stores_failed_total"],
        "device_peak_bytes": cached.device_peak_bytes,
    }
    for place, name in enumerate(("gpu", "host")):
        peak = max(sample[2 + place] for sample in cached.samples)
        facts[name] = {
            "page_bytes": tiers[name]["page_bytes"],
            "capacity_bytes": tiers[name]["capacity_bytes"],
            "capacity_pages": tiers[name]["pages"]["total"],
            "share_of_working_set": tiers[name]["pages"]["total"] * page_bytes / result.working_set_bytes,
            "peak_pages": peak,
            "peak_bytes": peak * tiers[name]["page_bytes"],
            "evicted_pages": int(counters[f"evicted_pages_{name}"]),
            "users_at_end": tiers[name]["users"],
        }
    return facts
