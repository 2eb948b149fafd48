"""What copies between the tiers cost whoever computes meanwhile: a captured forward, and whole batches by the engine."""

from __future__ import annotations

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
from transfer_hit import WarmBatches
from transfer_ways import KINDS, LONG, SHAPE, Places, Tiers, Way

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.cache.index import Copy  # noqa: E402
from mtserve.model.presets import build  # noqa: E402
from mtserve.transfer.mover import LOAD  # noqa: E402

FORWARD = Case("hstu-512", 8, 4096, 128, 256, False)


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
