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

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_forward import Case, Layers, plan_of
from bench_loop import CANDIDATES, Traffic
from transfer_ways import KINDS, PAGES, SHAPE, Places, Tiers, Way

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve import Engine, EngineConfig  # noqa: E402
from mtserve._core import PageAllocator  # noqa: E402
from mtserve.cache.index import Copy  # noqa: E402
from mtserve.model.presets import build  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.transfer.mover import LOAD, runs  # noqa: E402
from mtserve.types import Request  # noqa: E402

ROUNDS = 7
LONG = [4096] * 8  # tokens of the users moved together
MIXED = [4096] * 8 + [700] * 252 + [50] * 252
LARGEST_ERROR = 2e-2  # relative L2 between the logits of the cached and the uncached engine, both bf16
FORWARD = Case("hstu-512", 8, 4096, 128, 256, False)


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


def measure_beside(tiers: Tiers, seed: int) -> dict[str, Any]:
    """How much longer a forward, and a whole warm batch, takes while each way keeps the link busy; and its rate then."""
    copies = {kind: Places("as allocated", seed).copies(kind, LONG) for kind in KINDS}
    report: dict[str, Any] = {"forward": {}, "batch": {}}
    with torch.inference_mode():
        layers, x = captured_forward(seed)
        layers.run(x)
        for name in tiers.ways:
            for label, kinds in (("load", (LOAD,)), ("both", KINDS)):
                each = forwards_beside(tiers.ways[name], kinds, copies, layers)
                report["forward"].setdefault(name, {})[label] = each
                show("a forward", name, label, each)
    with WarmBatches(seed) as warm:
        for name in tiers.ways:
            for label, kinds in (("load", (LOAD,)), ("both", KINDS)):
                each = batches_beside(tiers.ways[name], kinds, copies, warm)
                report["batch"].setdefault(name, {})[label] = each
                show("a warm batch", name, label, each)
    return report


def show(what: str, name: str, label: str, each: dict[str, float]) -> None:
    print(
        f"beside {what}: {name:<18} {label:<5} {each['alone_ms']:.3f} -> {each['beside_ms']:.3f} ms"
        f" (x{each['slowdown']:.3f}), {each['gb_per_s']:.1f} GB/s each way",
        flush=True,
    )


def captured_forward(seed: int) -> tuple[Layers, torch.Tensor]:
    """FORWARD's layers over scattered pages, and tokens."""
    model = build(FORWARD.model, seed=seed).to("cuda", torch.bfloat16)
    plan = plan_of(FORWARD, model.config, FORWARD.users, np.random.default_rng(seed))
    pool = torch.randn((int(plan.page_table.max()) + 1, *SHAPE.sizes), device="cuda", dtype=torch.bfloat16)
    return Layers(model, pool, plan, FORWARD, deterministic=False), torch.randn(
        plan.rows, model.config.d, device="cuda", dtype=torch.bfloat16
    )


def forwards_beside(
    way: Way, kinds: tuple[str, ...], copies: dict[str, list[Copy]], layers: Layers
) -> dict[str, float]:
    """Replays of one graph, back to back: as many alone, then under copies."""
    count, rounds = 80, 7

    def replays() -> list[torch.cuda.Event]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            layers._graph.replay()
            mark.record()
        return marks

    def times(marks: list[torch.cuda.Event]) -> list[float]:
        torch.cuda.synchronize()
        return [first.elapsed_time(last) for first, last in pairwise(marks)]

    times(replays())
    alone = statistics.median(times(replays()))
    began = time.perf_counter()
    waits = [way(kind, copies[kind]) for kind in kinds]
    marks = replays()
    for _ in range(rounds - 1):
        following = [way(kind, copies[kind]) for kind in kinds]
        for wait in waits:
            wait()
        waits = following
    for wait in waits:
        wait()
    seconds = time.perf_counter() - began
    spans = times(marks)
    under = [each for each, end in zip(spans, np.cumsum(spans), strict=True) if end < 0.8e3 * seconds]
    beside = statistics.median(under)
    size = rounds * sum(len(copy.gpu_pages) for copy in copies[kinds[0]]) * SHAPE.bytes
    return {
        "alone_ms": alone, "beside_ms": beside, "slowdown": beside / alone, "counted": len(under),
        "gb_per_s": size / seconds / 1e9,
    }  # fmt: skip


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


def batches_beside(
    way: Way, kinds: tuple[str, ...], copies: dict[str, list[Copy]], warm: WarmBatches
) -> dict[str, float]:
    """Warm batches on this thread, by turns alone and while another thread keeps the link busy."""
    alone, beside, seconds = [], [], 0.0
    with BusyLink(way, kinds, copies) as link:
        for _ in range(6):
            alone += [warm.batch() for _ in range(30)]
            link.start()
            began, before = time.perf_counter(), link.moved
            beside += [warm.batch() for _ in range(30)]
            seconds += time.perf_counter() - began
            link.counted += link.moved - before
            link.pause()
    middle, late = statistics.median(alone), statistics.median(beside)
    return {
        "alone_ms": middle, "beside_ms": late, "slowdown": late / middle, "gb_per_s": link.counted / seconds / 1e9
    }  # fmt: skip


class BusyLink:
    """A thread that has copies under way all the time between `start` and `pause`."""

    def __init__(self, way: Way, kinds: tuple[str, ...], copies: dict[str, list[Copy]]) -> None:
        self._start = lambda: [way(kind, copies[kind]) for kind in kinds]
        self._size = sum(len(copy.gpu_pages) for copy in copies[kinds[0]]) * SHAPE.bytes
        self._wanted, self._resting, self._over = threading.Event(), threading.Event(), False
        self.moved = self.counted = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        torch.cuda.set_device(0)
        waits: list[Callable[[], None]] = []
        while not self._over:
            following = self._start() if self._wanted.is_set() else []
            for wait in waits:
                wait()
            self.moved += self._size if waits else 0
            waits = following
            if not waits:
                self._resting.set()
                self._wanted.wait()

    def start(self) -> None:
        self._resting.clear()
        self._wanted.set()
        time.sleep(0.02)

    def pause(self) -> None:
        self._wanted.clear()
        self._resting.wait()

    def __enter__(self) -> BusyLink:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over = True
        self._wanted.set()
        self._thread.join()


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
        max_batch_requests=users, write_back_idle_ms=0,
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("alone", "beside", "hit"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "transfer.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; this benchmark is for a machine that has one")
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
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
