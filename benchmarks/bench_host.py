"""The host's own time for a batch: what is left where the GPU and the link take none (null_driver.py).

    python benchmarks/bench_host.py [--rounds 60] [--out host.json]

restored  whole batches of users whose states only the host has, as bench_restore.py has them on a GPU, in microseconds from
          the first look at the queue: until the link could begin (`link`), until the layers that are encoded meanwhile were
          launched (`early`), until all was launched (`launched`), and the last answer (`answered`).
warm      batches of users whose states the device has, a few behaviours more each.
rows      laying out a batch of so many rows, by how many rows a part has that a thread takes at once (`rows_of_part`).
Medians. Before layouts are timed, those in parts are held against the same batch in one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arguments import make_parser, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import null_driver  # noqa: E402
import restore_case  # noqa: E402
from bench_loop import NEW, Traffic  # noqa: E402
from restore_case import Case, Turns  # noqa: E402

from mtserve import Engine, EngineConfig, _core  # noqa: E402
from mtserve.engine.forward.batch import BatchArrays, BatchSize, tile_capacity  # noqa: E402
from mtserve.engine.forward.graphs import GraphRunner  # noqa: E402
from mtserve.kernels.token_embedding.batch import TILE_TOKENS  # noqa: E402
from mtserve.model.presets import build, default_schema  # noqa: E402
from mtserve.model.tokeniser import GAP_THRESHOLDS_MS  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.transfer.cuda_mover import CudaMover  # noqa: E402

CASES = (
    Case("hstu-512", 1, 4096, "x8"),
    Case("hstu-512", 8, 4096, "x8"),
    Case("hstu-512", 8, 4096, "kv"),
    Case("mtgr-large", 8, 1036, "x8", new=64),
)
WAYS = ("recompute", "load", "split")
WARM_UP = 10
WARM_BATCHES, WARM_HISTORY = (1, 8, 32), 1024
LAYOUT_USERS, LAYOUT_HISTORIES = 8, (512, 4096, 16_384)
ROWS_OF_PART = (1 << 24, 16_384, 8192, 4096, 2048)


class Marks:
    """When the first of each of a batch's steps was over."""

    def __init__(self) -> None:
        self._over: dict[str, float] = {}
        self._note(CudaMover, "submit_split", "link")
        self._note(GraphRunner, "start_early", "early")
        self._note(GraphRunner, "start", "launched")

    def _note(self, owner: type, method: str, mark: str) -> None:
        call = getattr(owner, method)

        def noted(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            self._over.setdefault(mark, time.perf_counter())
            return result

        setattr(owner, method, noted)

    def take(self) -> dict[str, float]:
        """Those since the last call, by name."""
        over, self._over = self._over, {}
        return over


def on_the_host(case: Case, model: Any) -> EngineConfig:
    return replace(ENGINE_CONFIG(case, model), device="cpu", dtype="bfloat16")


ENGINE_CONFIG = restore_case.engine_config


def restored(case: Case, rounds: int, marks: Marks) -> dict[str, dict[str, float]]:
    """Microseconds by way and mark."""
    turns, found = Turns(case), {}
    for way in WAYS:
        times: dict[str, list[float]] = {}
        for turn in range(WARM_UP + rounds):
            requests = turns.prepare(way)
            marks.take()
            seconds, _ = turns.ask(requests)
            over = {"answered": turns.began + seconds, **marks.take()}
            if turn >= WARM_UP:
                for name, at in over.items():
                    times.setdefault(name, []).append(1e6 * (at - turns.began))
        found[way] = {name: round(statistics.median(values), 1) for name, values in times.items()}
    turns.close()
    return found


def warm(batch: int, rounds: int) -> float:
    """Microseconds of a batch."""
    config = EngineConfig(
        gpu_cache="2GiB",
        host_cache="1GiB",
        max_batch_requests=batch,
        dtype="bfloat16",
        device="cpu",
        host_pinning="wait",
    )
    model = build("hstu-512")
    traffic, times = Traffic(model.schema, 2 * batch, WARM_HISTORY, seed=0), []
    with Engine(model, config, start=False) as engine:
        traffic.start(engine)
        for _ in range(WARM_UP + rounds):
            futures = [traffic.submit(engine) for _ in range(batch)]
            engine._loop.run_inbox()
            began = time.perf_counter()
            while not all(future.done() for future in futures):
                engine._core.step()
            times.append(1e6 * (time.perf_counter() - began))
    return round(statistics.median(times[WARM_UP:]), 1)


class Layouts:
    """One batch of users none of whose tokens are cached, to be laid out again and again."""

    def __init__(self, history: int) -> None:
        rng, schema = np.random.default_rng(0), default_schema()
        users, end = len(schema.user), len(schema.user) + history
        self._schema, pages = schema, -(-end // EngineConfig.page_tokens)
        kept = [np.zeros(history, schema.behaviour_dtype) for _ in range(LAYOUT_USERS)]
        for rows in kept:
            rows["time_ms"] = np.cumsum(np.exp(rng.normal(9, 3, history))).astype(np.int64)
        self.rows = LAYOUT_USERS * end
        self._request = (
            [0, end, users + history, end, 0] * LAYOUT_USERS, [np.zeros(1, schema.user_dtype)] * LAYOUT_USERS, kept, [], [],
            [], np.arange(LAYOUT_USERS * pages, dtype=np.int32).reshape(LAYOUT_USERS, pages),
        )  # fmt: skip
        size = BatchSize(self.rows, LAYOUT_USERS, pages, 1 << 26, tile_capacity(self.rows, users + 2))
        self.arrays = BatchArrays.empty(size)

    def layout(self, rows_of_part: int) -> _core._BatchLayout:
        sizes = (
            each.itemsize
            for each in (self._schema.user_dtype, self._schema.behaviour_dtype, self._schema.candidate_dtype)
        )
        return _core._BatchLayout(
            len(self._schema.user), *sizes, page_tokens=EngineConfig.page_tokens, tile_tokens=TILE_TOKENS, full_attention=False,
            plain_norm=True, gap_thresholds=GAP_THRESHOLDS_MS, rows_of_part=rows_of_part,
        )  # fmt: skip

    def written(self, layout: _core._BatchLayout) -> list[bytes]:
        for array in self.arrays:
            array.fill(0)
        layout.plan(*self._request, self.arrays)
        return [array.tobytes() for array in self.arrays]

    def microseconds(self, layout: _core._BatchLayout, rounds: int) -> float:
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            layout.plan(*self._request, self.arrays)
            times.append(1e6 * (time.perf_counter() - began))
        return round(statistics.median(times), 1)


def laid_out(history: int, rounds: int) -> dict[str, Any]:
    """Microseconds by rows a part. Exits where several threads lay out another batch than one."""
    case = Layouts(history)
    layouts = {rows: case.layout(rows) for rows in ROWS_OF_PART}
    expected = case.written(layouts[ROWS_OF_PART[0]])
    for rows, layout in layouts.items():
        if case.written(layout) != expected:
            sys.exit(f"{case.rows} rows laid out in parts of {rows} differ from those of one part; no report")
    return {"rows": case.rows, "us": {str(rows): case.microseconds(each, rounds) for rows, each in layouts.items()}}


def main() -> int:
    parser = make_parser(__doc__, "host.json", cases=True)
    parser.add_argument("--rounds", type=int, default=60, help="batches of each kind")
    options = parser.parse_args()
    layouts = [laid_out(history, options.rounds) for history in LAYOUT_HISTORIES]
    restore_case.engine_config = on_the_host
    with tempfile.TemporaryDirectory() as folder:
        null_driver.install(Path(folder))
    marks = Marks()
    report: dict[str, Any] = {"benchmark": "host", "rows": layouts, "warm": {}, "restored": {}}
    for each in layouts:
        print(f"{each['rows']:>7} rows       us by rows of a part: {each['us']}", flush=True)
    for batch in WARM_BATCHES:
        report["warm"][str(batch)] = warm(batch, options.rounds)
        print(f"{batch:>7} warm users, {NEW} new behaviours each: {report['warm'][str(batch)]} us", flush=True)
    for case in (each for each in CASES if options.only in each.name):
        report["restored"][case.name] = restored(case, options.rounds, marks)
        for way, times in report["restored"][case.name].items():
            print(f"{case.name:<24} {way:<10} us: {times}", flush=True)
    write_report({**report, **stamp(seed=restore_case.SEED)}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
