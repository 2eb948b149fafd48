"""What the loop costs beside the GPU: warm users with few new behaviours each, more requests than the GPU can take.

    python benchmarks/bench_loop.py [--users 64] [--batch 32] [--history 4096] [--out loop.json]

Three views of the same traffic, medians where nothing else is said:
steps     the loop driven by hand, its queue always full: CPU time to plan and launch a batch, the GPU's time for it,
          and how long the GPU waits from one batch's end to the next one's copy.
profile   the same under the profiler: the share of the time in which no kernel and no copy ran.
clients   the engine's own thread and client threads in a closed loop, all in one Python process: one thread a user.
few       the same with two client threads, which keep as many requests under way: fewer contend for the interpreter.
sooner    both again where threads take turns as soon as in `mtserve replay`, not only after Python's own 5 ms.
Some scores are first held against the same engine without a cache; when they differ by more than bf16 does, nothing
is reported and the exit status is 1.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import make_parser, require_gpu, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.cli.interpreter import share_often  # noqa: E402
from mtserve.config import EngineConfig  # noqa: E402
from mtserve.engine.engine import Engine  # noqa: E402
from mtserve.model.presets import build  # noqa: E402
from mtserve.model.schema import FeatureSchema  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.types import Request, Rows  # noqa: E402

NEW, CANDIDATES, WARM_UP, LARGEST_ERROR = 4, 256, 8, 0.03


class Traffic:
    """Seeded behaviours and requests of `users` users, in turn."""

    def __init__(self, schema: FeatureSchema, users: int, history: int, seed: int, name: str = "user") -> None:
        self._schema, self._rng, self._next = schema, np.random.default_rng(seed), 0
        self.users = [f"{name}-{index}" for index in range(users)]
        self._ends = dict.fromkeys(self.users, history)
        self._history = history

    def behaviours(self, first: int, count: int) -> Rows:
        items, actions = self._rng.integers(0, 10**6, count), self._rng.integers(0, 4, count)
        times = (first + np.arange(count)) * 1000
        return self._schema.behaviours({"time_ms": times, "item": items, "action": actions})

    def start(self, engine: Engine) -> None:
        for user in self.users:
            engine.put_user(user, history=self.behaviours(0, self._history))

    def submit(self, engine: Engine) -> Any:
        """Append a few behaviours of the next user and ask for scores; the future."""
        user = self.users[self._next % len(self.users)]
        self._next += 1
        engine.append(user, self.behaviours(self._ends[user], NEW))
        self._ends[user] += NEW
        return engine.submit(Request(user, self._schema.candidates({"item": self._rng.integers(0, 10**6, CANDIDATES)})))


class Timed:
    """Notes when each batch of `engine` starts and ends on the GPU, and the CPU time of planning and launching it."""

    def __init__(self, engine: Engine) -> None:
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.launches: list[float] = []
        core = engine._core
        self.runner = runner = core.served.runner
        launch, to_copy, start = core.batches.launch, runner._metadata.to_copy, runner.start

        def to_copy_noted(*arguments: Any) -> Any:
            self._first = torch.cuda.Event(enable_timing=True)
            self._first.record()
            return to_copy(*arguments)

        def start_noted(*arguments: Any) -> Any:
            pending = start(*arguments)
            last = torch.cuda.Event(enable_timing=True)
            last.record()
            self.spans.append((self._first, last))
            return pending

        def launch_noted(slots: Any) -> Any:
            began = time.perf_counter()
            flight = launch(slots)
            self.launches.append(time.perf_counter() - began)
            return flight

        core.batches.launch, runner.start, runner._metadata.to_copy = launch_noted, start_noted, to_copy_noted

    def forget(self) -> None:
        torch.cuda.synchronize()
        self.spans.clear()
        self.launches.clear()

    def summary(self) -> dict[str, float]:
        """Of all batches since `forget`, in ms and shares; the GPU must have ended them."""
        torch.cuda.synchronize()
        busy = [first.elapsed_time(last) for first, last in self.spans]
        gaps = [max(0.0, a[1].elapsed_time(b[0])) for a, b in pairwise(self.spans)]
        return {
            "launch_cpu_ms": 1e3 * statistics.median(self.launches),
            "gpu_ms": statistics.median(busy),
            "gap_ms": statistics.median(gaps),
            "gpu_idle_share": sum(gaps) / (sum(gaps) + sum(busy)),
        }


def check(model: Any, history: int, seed: int) -> float:
    """Relative L2 between the logits of a cached and an uncached engine over a few rounds of three users."""
    logits = []
    for cache in ("on", "off"):
        traffic = Traffic(model.schema, 3, history, seed)
        with Engine(
            model, EngineConfig(cache=cache, gpu_cache="4GiB", host_cache="0"), start=False, clock=lambda: 2e9
        ) as engine:
            traffic.start(engine)
            got = []
            for _ in range(9):
                future = traffic.submit(engine)
                while not future.done():
                    engine.step()
                got.append(future.result().logits)
        logits.append(np.concatenate(got))
    return float(np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1]))


def config_of(batch: int) -> EngineConfig:
    return EngineConfig(gpu_cache="50%", host_cache="0", max_batch_requests=batch)


def drive(engine: Engine, traffic: Traffic, requests: int) -> None:
    """Ask, and step until all is answered."""
    for _ in range(requests):
        traffic.submit(engine)
    engine._loop.run_inbox()
    while engine._core.busy():
        engine._core.step()


def measure_steps(model: Any, users: int, batch: int, history: int, batches: int, seed: int) -> dict[str, Any]:
    """The loop by hand; requests are made between steps, on the same thread, while the GPU waits or works."""
    traffic = Traffic(model.schema, users, history, seed)
    with Engine(model, config_of(batch), start=False) as engine:
        traffic.start(engine)
        drive(engine, traffic, users)  # cold
        drive(engine, traffic, WARM_UP * batch)
        # Requests first, so that nothing but steps lies between batches.
        for _ in range(batches * batch):
            traffic.submit(engine)
        engine._loop.run_inbox()
        timed = Timed(engine)
        timed.forget()
        before = timed.runner.stats()
        began, steps = time.perf_counter(), []
        while engine._core.busy():
            step_began = time.perf_counter()
            engine._core.step()
            steps.append(time.perf_counter() - step_began)
        seconds = time.perf_counter() - began
        after = timed.runner.stats()
        rows, padded_rows = (after[name] - before[name] for name in ("rows", "padded_rows"))
        summary = timed.summary()
        timed.forget()
        for _ in range(batches):
            for _ in range(batch):
                traffic.submit(engine)
            engine._loop.run_inbox()
            engine._core.step()
        while engine._core.busy():
            engine._core.step()
        return {
            **summary,
            "launch_cpu_fresh_ms": timed.summary()["launch_cpu_ms"],
            "step_wall_ms": 1e3 * statistics.median(steps),
            "padded_rows_share": padded_rows / rows,
            "requests_per_s": batches * batch / seconds,
            "profile": profile(engine, traffic, batch, batches),
        }


def profile(engine: Engine, traffic: Traffic, batch: int, batches: int) -> dict[str, float]:
    """What the GPU did from the first kernel to the last, by the profiler's own record."""
    for _ in range(batches * batch):
        traffic.submit(engine)
    engine._loop.run_inbox()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        while engine._core.busy():
            engine._core.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
    )
    begin, end, busy = spans[0][0], spans[0][0], 0.0
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return {"activities": len(spans), "seconds": (end - begin) / 1e6, "gpu_idle_share": 1 - busy / (end - begin)}


def measure_clients(
    model: Any, users: int, batch: int, history: int, batches: int, seed: int, threads: int = 0, sooner: bool = False
) -> dict[str, Any]:
    """Users who append, ask and wait, each with one request under way, on `threads` client threads (0: one a user).

    `sooner`: threads take turns every SWITCH_S.
    """
    before = sys.getswitchinterval()
    try:
        if sooner:
            share_often()
        found = _clients(model, users, batch, history, batches, seed, threads)
        return {**found, "turns_ms": 1e3 * sys.getswitchinterval()}
    finally:
        sys.setswitchinterval(before)


def _clients(model: Any, users: int, batch: int, history: int, batches: int, seed: int, threads: int) -> dict[str, Any]:
    each, threads = max(1, batches * batch // users), threads or users
    with Engine(model, config_of(batch)) as engine:
        loads = [Traffic(model.schema, 1, history, seed + index, f"client-{index}") for index in range(users)]
        for load in loads:
            load.start(engine)
        timed = Timed(engine)
        latencies: list[float] = []

        def client(loads: list[Traffic], requests: int) -> None:
            under_way = deque((load, load.submit(engine)) for load in loads)
            for _ in range(requests * len(loads)):
                load, future = under_way.popleft()
                latencies.append(future.result().latency_s)
                under_way.append((load, load.submit(engine)))
            for _, future in under_way:
                future.result()

        for requests in (WARM_UP, each):
            timed.forget()
            latencies.clear()
            began = time.perf_counter()
            clients = [threading.Thread(target=client, args=(loads[k::threads], requests)) for k in range(threads)]
            for each_client in clients:
                each_client.start()
            for each_client in clients:
                each_client.join()
            seconds = time.perf_counter() - began
        summary = timed.summary()
    answered = users * (each + 1)
    latencies.sort()
    return {
        **summary,
        "threads": threads,
        "requests_per_s": answered / seconds,
        "latency_p50_ms": 1e3 * latencies[len(latencies) // 2],
        "latency_p99_ms": 1e3 * latencies[int(len(latencies) * 0.99)],
    }


def main() -> int:
    parser = make_parser(__doc__, "loop.json", seed=True)
    parser.add_argument("--model", default="hstu-512")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--history", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=60)
    options = parser.parse_args()
    require_gpu()
    model = build(options.model, seed=options.seed)
    error = check(model, 700, options.seed)
    if not error <= LARGEST_ERROR:
        print(f"FAILED: cached and uncached logits differ by {error:.2e} (relative L2)")
        return 1
    shape_of = (options.users, options.batch, options.history, options.batches, options.seed)
    result = {
        "steps": measure_steps(model, *shape_of),
        "clients": measure_clients(model, *shape_of),
        "few": measure_clients(model, *shape_of, threads=2),
        "clients sooner": measure_clients(model, *shape_of, sooner=True),
        "few sooner": measure_clients(model, *shape_of, threads=2, sooner=True),
    }
    for view, values in result.items():
        for name, value in values.items():
            print(f"{view:<14} {name:<20} {value if isinstance(value, dict) else f'{value:.3f}'}")
    shape = {key: getattr(options, key) for key in ("model", "users", "batch", "history")}
    shape |= {"new": NEW, "candidates": CANDIDATES}
    report = {"stamp": stamp(seed=options.seed, device="cuda:0"), **shape, "relative_l2_uncached": error, **result}
    write_report(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
