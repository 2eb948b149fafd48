"""What the loop costs beside the GPU: a closed loop, saturated, of warm users with few new behaviours each.

    python benchmarks/bench_loop.py [--users 64] [--batch 32] [--history 4096] [--out loop.json]

Prints medians a batch: CPU time to plan and launch it, time from its first to its last kernel, wall time, and the
share of the wall time in which the GPU had nothing to do. Some scores are first held against the same engine
without a cache; when they differ by more than bf16 does, nothing is reported and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.config import EngineConfig  # noqa: E402
from mtserve.engine.engine import Engine  # noqa: E402
from mtserve.model.presets import build  # noqa: E402
from mtserve.model.schema import FeatureSchema  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.types import Request, Rows  # noqa: E402

NEW, CANDIDATES, WARM_UP, LARGEST_ERROR = 4, 256, 8, 0.03


class Traffic:
    """Seeded behaviours and requests of `users` users, in turn."""

    def __init__(self, schema: FeatureSchema, users: int, history: int, seed: int) -> None:
        self._schema, self._rng, self._next = schema, np.random.default_rng(seed), 0
        self.users = [f"user-{index}" for index in range(users)]
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
    """A runner that notes the CPU time of each start and the span of its kernels."""

    overlaps = True

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def start(self, plan: Any) -> Any:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        pending = self._runner.start(plan)
        last.record()
        self.spans.append((first, last))
        return pending


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


def measure(model: Any, users: int, batch: int, history: int, batches: int, seed: int) -> dict[str, Any]:
    """Medians of a saturated loop: the queue always holds the next batch when one is planned."""
    config = EngineConfig(gpu_cache="50%", host_cache="0", max_batch_requests=batch)
    traffic = Traffic(model.schema, users, history, seed)
    with Engine(model, config, start=False) as engine:
        traffic.start(engine)
        core = engine._core
        core._runner = timed = Timed(core._runner)
        launch, launches = core._launch, []

        def launch_timed(slots: Any) -> Any:
            began = time.perf_counter()
            flight = launch(slots)
            launches.append(time.perf_counter() - began)
            return flight

        core._launch = launch_timed  # type: ignore[method-assign]
        steps = []
        for index in range(WARM_UP + batches):
            for _ in range(batch):
                traffic.submit(engine)
            engine._loop.run_inbox()
            began = time.perf_counter()
            core.step()
            steps.append(time.perf_counter() - began)
            if index == WARM_UP - 1:
                timed.spans.clear(), launches.clear(), steps.clear()
        while core.busy():
            core.step()
        torch.cuda.synchronize()
        spans = [first.elapsed_time(last) for first, last in timed.spans[: len(steps)]]
        padded = timed.padded_rows / max(1, timed.rows)
        kernels = core.kernels
    wall, gpu = 1e3 * statistics.median(steps), statistics.median(spans)
    return {
        "kernels": kernels,
        "launch_cpu_ms": 1e3 * statistics.median(launches[: len(steps)]),
        "kernels_span_ms": gpu,
        "step_wall_ms": wall,
        "gpu_idle_share": max(0.0, 1 - gpu / wall),
        "padded_rows_share": padded,
        "requests_per_s": batch / wall * 1e3,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hstu-512")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--history", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "loop.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; this benchmark is for a machine that has one")
    model = build(options.model, seed=options.seed)
    error = check(model, 700, options.seed)
    if not error <= LARGEST_ERROR:
        print(f"FAILED: cached and uncached logits differ by {error:.2e} (relative L2)")
        return 1
    result = measure(model, options.users, options.batch, options.history, options.batches, options.seed)
    for name, value in result.items():
        print(f"{name:<20} {value if isinstance(value, str) else f'{value:.3f}'}")
    shape = {key: getattr(options, key) for key in ("model", "users", "batch", "history")}
    report = {"stamp": stamp(seed=options.seed, device="cuda:0"), **shape, "relative_l2_uncached": error, **result}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
