"""What a host hit costs a batch, beside its transfer and its compute by themselves."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_loop import CANDIDATES, Traffic
from transfer_ways import SHAPE

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve import Engine, EngineConfig  # noqa: E402
from mtserve._core import PageAllocator  # noqa: E402
from mtserve.cache.index import Copy  # noqa: E402
from mtserve.model.presets import build  # noqa: E402
from mtserve.transfer.mover import LOAD  # noqa: E402
from mtserve.types import Request  # noqa: E402

ROUNDS = 7
LARGEST_ERROR = 2e-2  # relative L2 between the logits of a host hit and of a GPU hit, both bf16


def measure_hit(seed: int) -> dict[str, Any]:
    """One batch of 8 users whose states only the host has, submission to last answer, and its two parts by themselves."""
    model = build("hstu-512", seed=seed)
    users, history, batches = 8, 4096, 12
    rng = np.random.default_rng(seed)
    traffics = [Traffic(model.schema, users, history, seed + group, f"group-{group}") for group in range(2)]
    items = model.schema.candidates({"item": rng.integers(0, 10**6, CANDIDATES)})
    room = users * -(-(history + len(model.schema.user)) // SHAPE.page_tokens)
    config = EngineConfig(
        gpu_cache=str(room * SHAPE.bytes), host_cache="4GiB", host_pinning="wait", restore="load",
        max_batch_requests=users, write_back_idle_ms=0, graphs="on",
    )  # fmt: skip
    with Engine(model, config, start=False) as engine:
        for traffic in traffics:
            traffic.start(engine)

        def ask(traffic: Traffic) -> tuple[float, list[Any]]:
            requests = [Request(user, items) for user in traffic.users]
            began = time.perf_counter()
            futures = []
            for request in requests:
                futures.append(engine.submit(request))
                engine.step()  # as a running engine would: the first load begins with the first request
            while not all(future.done() for future in futures):
                engine.step()
            seconds = time.perf_counter() - began
            while engine._core.busy():  # write-backs
                engine.step()
            return seconds, [future.result() for future in futures]

        for _ in range(4):
            for traffic in traffics:
                ask(traffic)
        hits = []
        for turn in range(batches):
            seconds, results = ask(traffics[turn % 2])
            assert all(result.host_tokens == result.prefix_tokens for result in results)
            hits.append(seconds)
            _, again = ask(traffics[turn % 2])
            assert all(result.gpu_tokens == result.prefix_tokens for result in again)
            worst = max(
                float(np.linalg.norm(a.logits - b.logits) / np.linalg.norm(b.logits))
                for a, b in zip(results, again, strict=True)
            )
            if not worst <= LARGEST_ERROR:
                sys.exit(f"a host hit's logits differ from a GPU hit's by {worst:.2e} (relative L2); no report")
        transfer = measure_transfer(engine, users, history)
        waits = {group: engine.metrics.value("load_wait_seconds_total", group) for group in ("0", "1", "2", "3")}
        over = engine.metrics.value("batches_over_loads_total")
    with WarmBatches(seed, users, history) as warm:
        compute = statistics.median(warm.batch() for _ in range(30)) / 1e3
    hit = statistics.median(hits)
    report = {
        "hit_ms": 1e3 * hit, "transfer_ms": 1e3 * transfer, "compute_ms": 1e3 * compute,
        "ratio": hit / max(transfer, compute), "batches_over_loads": over, "load_wait_s": waits,
        "relative_l2": worst,
    }  # fmt: skip
    print(
        "host hit:",
        {key: value if isinstance(value, dict) else round(value, 4) for key, value in report.items()},
        flush=True,
    )
    return report


def measure_transfer(engine: Engine, users: int, history: int) -> float:
    """Seconds that the engine's mover takes for one batch's states by themselves, pages as the index has placed them."""
    index, mover = engine._core.tiers.index, engine._core.tiers.mover  # type: ignore[union-attr]
    pages = len(mover.pool) // users
    gpu = PageAllocator(len(mover.pool))
    copies = [
        Copy(
            u,
            "",
            np.array(gpu.take(pages), np.int32),
            np.arange(u * pages, (u + 1) * pages, dtype=np.int32),
            0,
            history,
        )
        for u in range(users)
    ]
    assert index.stats().host.total >= users * pages
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        mover.submit(LOAD, copies)
        mover.wait()
        seconds.append(time.perf_counter() - began)
        mover.poll()
    engine.invalidate()  # the pages hold others' states now
    return statistics.median(seconds)


class WarmBatches:
    """An engine whose users' states are all on the GPU; each batch asks for all of them, from submission to answers."""

    def __init__(self, seed: int, users: int = 8, history: int = 4096) -> None:
        model = build("hstu-512", seed=seed)
        traffic = Traffic(model.schema, users, history, seed)
        self.engine = Engine(model, EngineConfig(gpu_cache="2GiB", host_cache="0"), start=False)
        traffic.start(self.engine)
        items = np.random.default_rng(seed).integers(0, 10**6, CANDIDATES)
        self.requests = [Request(user, model.schema.candidates({"item": items})) for user in traffic.users]
        for _ in range(20):
            self.batch()

    def batch(self) -> float:
        """Milliseconds of one batch."""
        began = time.perf_counter()
        futures = [self.engine.submit(request) for request in self.requests]
        while not all(future.done() for future in futures):
            self.engine.step()
        return 1e3 * (time.perf_counter() - began)

    def __enter__(self) -> WarmBatches:
        return self

    def __exit__(self, *raised: object) -> None:
        self.engine.close()
