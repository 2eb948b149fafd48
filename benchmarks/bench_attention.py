"""Attention of one layer on one GPU, cached and full, beside its floor and its target.

    python benchmarks/bench_attention.py [--sweep] [--out FILE]

H = 4 heads, bf16, random K and V in pages drawn at random; many layers and projections in rotation, so that nothing
is still in L2. Times are medians of CUDA graphs of launches. Where keys are split, `ms` leaves the partial sums to
the next kernel, as a forward does (norm and gate reads them); `partials_mb` is what that kernel then reads. Before a
shape is timed, rows of it are held against fp32; a wrong one means no report.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import make_parser, require_gpu, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.kernels.attention.cuda import AttentionKernel  # noqa: E402
from mtserve.kernels.attention.work import BLOCK, FIRST_HALF_SHIFT, build_work, sum_partial  # noqa: E402
from mtserve.kernels.page_write.rounding import movable  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402

HEADS, N = 4, 1000
FLOPS, BYTES = 600e12, 4.2e12  # what an H200 reaches
LARGEST_ERROR = 4e-3  # relative L2 against fp32; plain torch in bf16 has 3e-3
ROTATED_BYTES = 200 << 20  # L2 has 50 MiB
CHECKED_ROWS = 96


@dataclass(frozen=True)
class Case:
    """`target_ms`: what the kernel is meant to reach; None: no target is set."""

    name: str
    head_dim: int
    batch: int
    cached: int
    new: int
    target_ms: float | None
    candidates: int = 256


CASES = (
    Case("cached B1 L4096", 128, 1, 4096, 32, 0.015),
    Case("cached B8 L1024", 128, 8, 1024, 32, 0.020),
    Case("cached B8 L4096", 128, 8, 4096, 32, 0.055),
    Case("cached B32 L1024", 128, 32, 1024, 32, None),
    Case("cached B32 L8192", 128, 32, 8192, 32, 0.33),
    Case("cached D256 B8 L1024", 256, 8, 1024, 128, None),
    Case("cached D256 B8 L4096", 256, 8, 4096, 128, 0.10),
    Case("full B8 L1024", 128, 8, 0, 1024, None),
    Case("full B8 L4096", 128, 8, 0, 4096, 0.28),
    Case("full D256 B8 L4096", 256, 8, 0, 4096, None),
    Case("full B32 L8192", 128, 32, 0, 8192, 3.9),
)


class Problem:
    """One case on the GPU; `pages_dtype`: of the pool, bf16 or fp8."""

    def __init__(self, case: Case, seed: int, pages_dtype: torch.dtype = torch.bfloat16) -> None:
        self.case, self.device = case, torch.device("cuda", torch.cuda.current_device())
        self.each = case.new + case.candidates
        self.rows, self.width = case.batch * self.each, HEADS * case.head_dim
        pages = -(-case.cached // BLOCK)
        size = 2 * self.width * (2 * case.batch * pages * BLOCK + 4 * self.rows)
        self.layers = int(np.clip(-(-ROTATED_BYTES // size), 2, 12))
        generator = torch.Generator(device=self.device).manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            made = torch.empty(shape, device=self.device, dtype=torch.bfloat16)
            return made.normal_(generator=generator)

        pool = random(max(1, case.batch * pages), self.layers, 2, BLOCK, HEADS, case.head_dim)
        self.pool = pool.to(pages_dtype)
        self.uvqk = [random(self.rows, 4, HEADS, case.head_dim) for _ in range(min(3, self.layers))]
        table = np.random.default_rng(seed).permutation(case.batch * pages).reshape(case.batch, pages)
        self.table = torch.from_numpy(np.pad(table, ((0, 0), (0, int(pages == 0)))).astype(np.int32))
        self.slots: np.ndarray[Any, np.dtype[np.int32]] = np.array(
            [(case.cached, case.new, b * self.each, self.each) for b in range(case.batch)], np.int32
        )
        prefix = case.cached + case.new
        one = np.concatenate([np.arange(case.cached + 1, prefix + 1), np.full(case.candidates, prefix)])
        self.limits = np.tile(one, case.batch).astype(np.int32)
        self.kernels = {
            deterministic: AttentionKernel(
                HEADS, case.head_dim, torch.bfloat16, BLOCK, self.layers, self.pool, self.device,
                deterministic=deterministic,
            )
            for deterministic in (False, True)
        }  # fmt: skip

    def plan(self, **options: Any) -> None:
        self.kernel = self.kernels[options.get("deterministic", False)]
        self.work, self.planned = build_work(
            self.slots, self.limits, self.table, heads=HEADS, head_dim=self.case.head_dim, sms=self.kernel.sms,
            device=self.device, **options,
        )  # fmt: skip
        shape = (self.rows, self.width)
        if self.planned.max_splits > 1 or self.kernel.deterministic:
            self.out = torch.full((self.planned.max_splits, *shape), float("nan"), device=self.device)
        else:
            self.out = torch.full(shape, float("nan"), device=self.device, dtype=torch.bfloat16)

    def run(self, turn: int) -> None:
        self.kernel.run(self.uvqk[turn % len(self.uvqk)], turn % self.layers, self.work, self.out, N)

    def result(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [len(rows), H * D], the partial sums added."""
        if self.out.ndim == 2:
            return self.out[rows].float()
        return sum_partial(self.out[:, rows], self.work.splits[rows], halves=self.kernel.deterministic)

    def check(self) -> float:
        """Relative L2 of some rows of the first and last slot against fp32. Exits when it is too large."""
        got, expected = [], []
        self.run(1)
        for slot in {0, self.case.batch - 1}:
            rows = np.random.default_rng(slot).choice(self.each, min(self.each, CHECKED_ROWS), replace=False)
            index = torch.from_numpy(np.sort(rows)).to(self.device)
            got.append(self.result(index + slot * self.each))
            expected.append(self._expected(slot, index))
        difference, truth = torch.cat(got) - torch.cat(expected), torch.cat(expected)
        error = float(difference.norm() / truth.norm())
        if not error <= LARGEST_ERROR:
            sys.exit(f"{self.case.name}: relative L2 {error:.2e} against fp32, the limit is {LARGEST_ERROR}; no report")
        return error

    def _expected(self, slot: int, index: torch.Tensor) -> torch.Tensor:
        case, first = self.case, slot * self.each
        _, v, q, k = (x.double() for x in self.uvqk[1 % len(self.uvqk)][first : first + self.each].unbind(1))
        ids = self.table[slot, : case.cached // BLOCK].long().to(self.device)
        old = movable(self.pool)[ids, 1].view(self.pool.dtype).double()
        old_k, old_v = old.transpose(0, 1).flatten(1, 2)
        keys, values = torch.cat((old_k, k[: case.new])), torch.cat((old_v, v[: case.new]))
        limit = torch.from_numpy(self.limits[first : first + self.each]).to(self.device)[index]
        hidden = torch.arange(len(keys), device=self.device) >= limit[:, None]
        alpha = case.head_dim**-0.5
        weights = torch.nn.functional.silu(alpha * torch.einsum("rhd,nhd->hrn", q[index], keys))
        out = torch.einsum("hrn,nhd->rhd", weights.masked_fill(hidden, 0.0), values)
        own = torch.nn.functional.silu(alpha * (q[index] * k[index]).sum(-1, keepdim=True)) * v[index]
        out += torch.where((index >= case.new)[:, None, None], own, 0.0)
        return (out / N).flatten(1).float()

    def time_ms(self, launches: int, replays: int = 9) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for turn in range(launches):
                self.run(turn)
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / launches)
        return statistics.median(times)

    @property
    def partial_sums(self) -> int:
        """Of all rows."""
        return int((self.work.splits & (1 << FIRST_HALF_SHIFT) - 1).sum())

    @property
    def flop(self) -> float:
        """4 H D a visible key, a candidate's own included."""
        return 4.0 * self.width * (float(self.limits.sum()) + self.case.batch * self.case.candidates)

    @property
    def bytes(self) -> float:
        """Each K and V once, q of each row, k and v of candidates, the output in bf16."""
        prefix = self.case.batch * (self.case.cached + self.case.new)
        saved = (2 - self.pool.element_size()) * self.case.batch * self.case.cached  # of each cached K and V
        return 2.0 * self.width * (2 * prefix + 2 * self.rows + 2 * self.case.batch * self.case.candidates - saved)


def measure(problem: Problem, **options: Any) -> dict[str, Any]:
    problem.plan(**options)
    error = problem.check()
    ms = problem.time_ms(4 if problem.flop > 1e12 else 24)
    split = problem.out.ndim == 3
    return {
        "ms": round(ms, 5),
        "tflops": round(problem.flop / ms / 1e9, 1),
        "gb_per_s": round(problem.bytes / ms / 1e6, 1),
        "relative_l2": error,
        "items": problem.planned.items,
        "splits": problem.planned.max_splits,
        "tile_rows": problem.planned.tile_rows,
        "partials_mb": round(problem.partial_sums * problem.width * 4 / 1e6, 1) if split else 0.0,
    }


def bench(case: Case, seed: int, sweep: bool) -> dict[str, Any]:
    problem = Problem(case, seed)
    floor = max(problem.flop / FLOPS, problem.bytes / BYTES) * 1e3
    fast, fixed = measure(problem), measure(problem, deterministic=True)
    row: dict[str, Any] = {
        "shape": case.name, "heads": HEADS, "head_dim": case.head_dim, "batch": case.batch, "cached": case.cached,
        "new": case.new, "candidates": case.candidates, "target_ms": case.target_ms, "floor_ms": round(floor, 5), **fast,
        "deterministic": fixed, "deterministic_cost": round(fixed["ms"] / fast["ms"] - 1, 3),
    }  # fmt: skip
    if sweep:
        tiles = (128, 192) if case.head_dim <= 128 else (128,)
        most = 16 if case.batch == 1 else 6 if case.cached else 2
        pieces = [each for each in (1, 2, 3, 4, 6, 8, 12, 16) if each <= most]
        row["sweep"] = [measure(problem, tile_rows=rows, pieces=each) for rows in tiles for each in pieces]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | ms | target | floor | TFLOP/s | GB/s | rel. L2 | tiles, items, splits | deterministic |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        target = (
            "-"
            if row["target_ms"] is None
            else f"{row['target_ms']} {'met' if row['ms'] <= row['target_ms'] else 'MISSED'}"
        )
        plan = f"{row['tile_rows']}, {row['items']}, {row['splits']}"
        fixed = f"{row['deterministic']['ms']:.4f} ({row['deterministic_cost']:+.0%})"
        lines.append(
            f"| {row['shape']} | {row['ms']:.4f} | {target} | {row['floor_ms']:.4f} | {row['tflops']:.0f} "
            f"| {row['gb_per_s']:.0f} | {row['relative_l2']:.1e} | {plan} | {fixed} |"
        )
        for each in row.get("sweep", []):
            lines.append(
                f"| - | {each['ms']:.4f} | | | {each['tflops']:.0f} | | | {each['tile_rows']}, {each['items']}, {each['splits']} | |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = make_parser(__doc__, seed=True, cases=True)
    parser.add_argument("--sweep", action="store_true", help="also time forced tiles and splits")
    options = parser.parse_args()
    require_gpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for case in CASES:
        if options.only in case.name:
            rows.append(bench(case, options.seed, options.sweep))
            torch.cuda.empty_cache()
    if not rows:
        sys.exit(f"no case's name contains {options.only!r}")
    print(table(rows))
    if options.out:
        report = {"benchmark": "attention", "rows": rows, **stamp(seed=options.seed, device="cuda:0")}
        write_report(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
