"""Replay of a trace through an engine, with its cache and without, and what the cache was worth."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mtserve.config import EngineConfig
from mtserve.engine.engine import Engine
from mtserve.engine.setup import page_shape, resolve_device, resolve_dtype
from mtserve.engine.tiers.footprint import Footprint, packed_format
from mtserve.engine.tiers.transfers import DIRECTIONS
from mtserve.errors import CorruptState, DeadlineExceeded, InvalidArgument
from mtserve.history.memory import MemoryHistory
from mtserve.metrics import GROUPS
from mtserve.model.ranking import RankingModel
from mtserve.trace.replay.agreement import Agreement, Difference, compare, judge, misplaced, verify
from mtserve.trace.replay.config import ReplayConfig
from mtserve.trace.replay.driver import Driver
from mtserve.trace.replay.features import TraceRows
from mtserve.trace.replay.run_log import MemorySample, RunLog
from mtserve.trace.schema import Trace
from mtserve.trace.working_set import resolve_capacity, working_set_pages
from mtserve.types import History, Request

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total)."""

SAMPLE_S = 0.05
DRAIN_S = 60.0
GAUGES = ("requests_in_flight", "loads_in_flight", "stores_in_flight")
WARM_UP_USERS = 8
COUNTERS = (
    "loads_total", "stores_total", "loads_failed_total", "stores_failed_total", "load_bytes_total",
    "store_bytes_total", "generations_total", "appended_behaviours_total", "batches_total", "batches_over_loads_total",
    "loads_declined_total", "write_backs_deferred_total", "evicted_unsaved_pages_total",
)  # fmt: skip


@dataclass(frozen=True)
class ReplayResult:
    """Both runs over one trace and how they compare. `baseline` is None when there was none."""

    trace: Trace
    model: RankingModel
    engine: EngineConfig  # as run: capacities in bytes where they were shares of the working set
    config: ReplayConfig
    working_set_bytes: int
    device: str
    dtype: str
    cached: RunLog
    baseline: RunLog | None
    agreement: Agreement

    @property
    def open_loop(self) -> bool:
        return self.config.speed > 0

    @property
    def speedup(self) -> float | None:
        """Closed loop: ratio of throughputs; open loop: ratio of the median latencies. None without a baseline."""
        if self.baseline is None or not self.cached.done.any() or not self.baseline.done.any():
            return None
        if self.open_loop:
            return self.baseline.latency_ms()["p50"] / self.cached.latency_ms()["p50"]
        return self.cached.throughput_rps / self.baseline.throughput_rps


def replay(
    trace: Trace,
    model: RankingModel,
    engine: EngineConfig,
    config: ReplayConfig,
    progress: Progress = lambda phase, done, total: None,
) -> ReplayResult:
    """Drive `trace` through `model` with the cache and without it, on the same kernels in the same loop.

    engine.gpu_cache and host_cache may also be shares of the trace's working set: "25%ws". Whatever
    engine.host_pinning says, host memory is pinned before a run begins: no figure depends on how fast that goes.
    Raises InvalidArgument when trace, model and configuration do not fit one another.
    """
    trace = trace.first(min(config.requests, trace.requests)) if config.requests else trace
    rows = TraceRows(trace, model.schema)
    _check_fit(trace, engine, config)
    working_set_bytes, engine = size_tiers(rows, model, replace(engine, host_pinning="wait"))
    cached, served, facts = _run(rows, model, engine, config, trace.requests, "with cache", progress)
    capped = trace.requests if config.baseline_requests < 0 else min(config.baseline_requests, trace.requests)
    baseline = None
    if capped:
        off = replace(engine, cache="off")
        baseline, _, _ = _run(rows, model, off, config, capped, "without cache", progress)
    progress("fp32 recompute", 0, config.verify)
    verified = verify(
        served, rows, cached, baseline, requests=config.verify, max_tokens=config.verify_tokens, seed=config.seed,
        progress=lambda done: progress("fp32 recompute", done, config.verify),
    )  # fmt: skip
    agreement = judge(
        facts["dtype"],
        Difference() if baseline is None else compare(cached, baseline),
        verified,
        sum(misplaced(run, rows) for run in (cached, baseline) if run is not None),
        sum(_broken(run) for run in (cached, baseline) if run is not None),
        engine.host_format,
        engine.gpu_format,
    )
    return ReplayResult(
        trace, model, engine, config, working_set_bytes, facts["device"], facts["dtype"], cached, baseline, agreement
    )


def _broken(run: RunLog) -> int:
    """Requests that failed for other reasons than a deadline that the caller asked for."""
    return sum(run.failures.values()) - run.failures[DeadlineExceeded.__name__]


def _check_fit(trace: Trace, engine: EngineConfig, config: ReplayConfig) -> None:
    if engine.cache == "off":
        raise InvalidArgument("replay always runs with the cache and without it", field="cache")
    if not trace.requests:
        raise InvalidArgument("the trace has no request", field="trace")
    most = int(trace.cand_lengths.max())
    if most > engine.max_candidates:
        raise InvalidArgument(
            f"a request of the trace has {most} candidates, the limit is {engine.max_candidates}",
            field="max_candidates",
        )
    if config.concurrency > engine.max_queue // 2:
        raise InvalidArgument(
            f"{config.concurrency} is above half of max_queue = {engine.max_queue}", field="concurrency"
        )


def size_tiers(rows: TraceRows, model: RankingModel, engine: EngineConfig) -> tuple[int, EngineConfig]:
    """(bytes of the working set's states, `engine` with shares of it turned into what each tier takes for them).

    Without a host tier nothing is kept in its format: the scores are held to what the lossless one allows.
    """
    dtype = resolve_dtype(engine.dtype, resolve_device(engine.device))
    states = page_shape(model.config, engine, dtype)
    pages = working_set_pages(
        rows.trace.user, rows.final_positions(), model.config, len(model.schema.user), engine.page_tokens
    )
    any_host = replace(engine, host_cache=resolve_capacity(engine.host_cache, pages, 1, "host_cache"))
    packed = packed_format(model.config, any_host, states)
    page_bytes = Footprint.of(states, packed)
    return pages * states.bytes, replace(
        engine,
        host_format=engine.host_format if packed is not None else "kv",
        gpu_cache=resolve_capacity(engine.gpu_cache, pages, page_bytes.gpu, "gpu_cache"),
        host_cache=resolve_capacity(engine.host_cache, pages, page_bytes.host, "host_cache"),
    )


def _run(
    rows: TraceRows,
    model: RankingModel,
    config: EngineConfig,
    options: ReplayConfig,
    requests: int,
    what: str,
    progress: Progress,
) -> tuple[RunLog, RankingModel, dict[str, Any]]:
    """One run with a fresh engine: histories and warm-up first, then the measured part."""
    run = RunLog.empty(rows.trace.cand_offsets[: requests + 1], len(model.config.tasks))
    longest = max(65536, int(rows.trace.history_lengths.max(initial=0)))
    with MemoryHistory(model.schema, max_append=longest) as history, Engine(model, config, history=history) as engine:
        _put_users(engine, rows, requests, what, progress)
        _warm_up(engine, rows, min(options.concurrency, WARM_UP_USERS))
        driver = Driver(
            engine, rows, run, speed=options.speed,
            concurrency=config.max_queue // 2 if options.speed else options.concurrency,
            progress=lambda done: progress(f"requests {what}", done, requests),
        )  # fmt: skip
        progress(f"requests {what}", 0, requests)
        with _quiet_heap(), _sampled(engine, driver, run):
            before = _counters(engine)
            driver.drive()
            run.counters = {name: count - before[name] for name, count in _counters(engine).items()}
        run.stats = engine.stats()
        _check_nothing_left(engine)
        if run.stats["device"] != "cpu":
            run.device_peak_bytes = torch.cuda.max_memory_allocated(run.stats["device"])
            torch.cuda.reset_peak_memory_stats(run.stats["device"])
        served = engine.model
    del engine, driver
    gc.collect()  # the tiers' memory, before the next engine takes its own
    return run, served, run.stats


def _check_nothing_left(engine: Engine) -> None:
    """Raises CorruptState unless every structure is sound and no request, copy or page is in flight once all has ended."""
    end = time.monotonic() + DRAIN_S
    drained = engine.drain(DRAIN_S)
    while True:
        left = {name: engine.metrics.value(name) for name in GAUGES}
        left |= {name: tier["pages"]["in_flight"] for name, tier in engine.stats()["tiers"].items()}
        if drained and not any(left.values()):
            break
        if time.monotonic() > end:
            raise CorruptState(f"in flight long after the last request: {left}", field="replay")
        time.sleep(0.01)  # last pages are saved when their users have paused
    engine.check()


def _put_users(engine: Engine, rows: TraceRows, requests: int, what: str, progress: Progress) -> None:
    asking = np.unique(rows.trace.user[:requests]).tolist()
    progress(f"histories {what}", 0, len(asking))
    for done, user in enumerate(asking, 1):
        engine.put_user(rows.trace.user_ids[user], rows.user(user), rows.history(user))
        progress(f"histories {what}", done, len(asking))


def _warm_up(engine: Engine, rows: TraceRows, users: int) -> None:
    """Run short to long histories twice, encoded in whole and with a delta, and forget them again.

    Allocators and libraries are at work from the first measured request on; the caches are empty.
    """
    trace = rows.trace
    by_length = trace.user[np.argsort(trace.prefix_lengths(), kind="stable")]
    places = np.linspace(0, len(by_length) - 1, users).astype(np.int64)
    for held_back in (1, 0):
        futures = []
        for number, user in enumerate(by_length[places].tolist()):
            behaviours = rows.history(user)
            history = History(rows.user(user), 0, behaviours[: max(0, len(behaviours) - held_back)])
            candidates = rows.candidates(trace.request(int(np.argmax(trace.user == user))))
            futures.append(engine.submit(Request(f"warm-up {number}", candidates, history=history)))
        for future in futures:
            future.exception()
    engine.invalidate()


def _counters(engine: Engine) -> dict[str, float]:
    """Counters as of now; they only grow, so that a difference tells of one part of the engine's life."""
    stats = engine.stats()
    counters = {name: float(engine.metrics.value(name)) for name in COUNTERS}
    counters["batch_tokens"] = engine.metrics.distribution("batch_tokens").sum
    counters |= {name: float(stats["runner"][name]) for name in ("rows", "padded_rows")}
    counters |= {f"loop_s_{phase}": seconds for phase, seconds in stats["loop_seconds"].items()}
    counters["batches_s"] = stats["batch_seconds"]
    for kind in DIRECTIONS:
        counters[f"{kind}_s"] = stats["transfers"].get(kind, {}).get("busy_seconds", 0.0)
    for group in GROUPS:
        counters[f"load_wait_s_{group}"] = float(engine.metrics.value("load_wait_seconds_total", group))
    for tier in ("gpu", "host"):
        counters[f"evicted_pages_{tier}"] = float(stats["tiers"].get(tier, {}).get("evicted_pages", 0))
    return counters


@contextmanager
def _quiet_heap() -> Iterator[None]:
    """Keep what setup left on the heap out of the collector's way while time is measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _sampled(engine: Engine, driver: Driver, run: RunLog) -> Iterator[None]:
    """Sample the tiers' use every SAMPLE_S, and once at the end, while the block runs."""
    if engine.config.cache == "off":
        yield
        return
    stop = threading.Event()

    began = time.perf_counter()

    def take() -> None:
        tiers = engine.stats()["tiers"]
        used = (tiers[name]["pages"]["used"] + tiers[name]["pages"]["in_flight"] for name in ("gpu", "host"))
        run.samples.append(MemorySample(time.perf_counter() - began, driver.finished, *used))

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            take()

    thread = threading.Thread(target=sample, name="mtserve-replay-sampler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    take()
