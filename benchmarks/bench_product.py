"""The products of one layer on one GPU: ours with fused epilogues, beside the library's without them and the floor.

    python benchmarks/bench_product.py [--only NAME] [--out FILE]

"projection": [T, d] x [d, 4 w] with bias, SiLU and the page write of every second row; "output": x [T, d] +=
[T, w] x [w, d]. bf16, w = d. Times are medians of CUDA graphs of launches, the weights of several layers in rotation.
"torch.mm alone" is the bare product. Every way is held against fp32 before it is timed; a wrong one means no report.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import make_parser, require_gpu, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.kernels.product.cuda import TILES, Tile, tile_of  # noqa: E402
from mtserve.kernels.projection_silu.cuda import PAGE_TOKENS, ProjectionKernel  # noqa: E402
from mtserve.kernels.residual_product.cuda import ResidualKernel  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402

FLOPS, BYTES = 600e12, 4.2e12  # what an H200 reaches
LARGEST_ERROR = 4e-3  # relative L2 against fp32; plain torch in bf16 has 3e-3
CHECKED_ROWS = 4096
LAYERS, LAUNCHES, REPLAYS = 4, 20, 9
ROWS, WIDTHS = (384, 768, 3072, 8448, 35840), (512, 1024)

Way = Callable[[int], None]  # one launch (or two) for a layer


@dataclass(frozen=True)
class Case:
    kind: str
    rows: int
    d: int

    @property
    def name(self) -> str:
        return f"{self.kind} T{self.rows} d{self.d}"

    @property
    def columns(self) -> int:
        return 4 * self.d if self.kind == "projection" else self.d

    @property
    def floor_ms(self) -> float:
        """Of the product, or of reading the operands and writing the result once."""
        moved = self.rows * (self.d + self.columns) + self.d * self.columns
        moved += self.rows * self.d  # half the rows' k and v, or the old x
        return max(self.flop / FLOPS, 2 * moved / BYTES) * 1e3

    @property
    def flop(self) -> float:
        return 2.0 * self.rows * self.d * self.columns


CASES = [Case(kind, rows, d) for kind in ("projection", "output") for d in WIDTHS for rows in ROWS]


class Problem:
    """What both kinds share: [T, d] `a`, `weights` [d, columns] and the output `out`, all bf16."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.device = case, torch.device("cuda", torch.cuda.current_device())
        self._generator = torch.Generator(device=self.device).manual_seed(seed)
        self.a = self.random(case.rows, case.d)
        self.weights = [self.random(case.d, case.columns) * case.d**-0.5 for _ in range(LAYERS)]
        self.out = self.random(case.rows, case.columns)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=torch.bfloat16).normal_(generator=self._generator)

    def tiles(self, run: Callable[..., None]) -> dict[str, Way]:
        """Ours in every tile; "ours" as it chooses."""
        ways: dict[str, Way] = {"ours": partial(run, tile=None)}
        for tile in TILES:
            ways[name_of(tile)] = partial(run, tile=tile)
        return ways

    def product_alone(self, layer: int) -> None:
        torch.mm(self.a, self.weights[layer], out=self.out)

    def held(self, name: str, got: torch.Tensor, expected: torch.Tensor) -> float:
        """Relative L2 error. Exits when it is too large."""
        error = float((got.float() - expected).norm() / expected.norm())
        if not error <= LARGEST_ERROR:
            sys.exit(f"{self.case.name}, {name}: relative L2 {error:.2e}, the limit is {LARGEST_ERROR}; no report")
        return error


class ProjectionProblem(Problem):
    def __init__(self, case: Case, seed: int) -> None:
        super().__init__(case, seed)
        pages = -(-case.rows // PAGE_TOKENS)
        self.pool = self.random(pages, LAYERS, 2, PAGE_TOKENS, 4, case.d // 4)
        self.bias = self.random(case.columns)
        places = torch.randperm(pages * PAGE_TOKENS, generator=self._generator, device=self.device)[: case.rows]
        self.target = torch.where(torch.arange(case.rows, device=self.device) % 2 == 0, places, -1).int()
        self.kernel = ProjectionKernel(case.d, case.d, torch.bfloat16, PAGE_TOKENS, LAYERS, self.pool, self.device)

    def ways(self) -> dict[str, Way]:
        def ours(layer: int, tile: Tile | None) -> None:
            self.kernel.run(self.a, self.weights[layer], self.bias, self.target, self.out, layer, tile=tile)

        return self.tiles(ours)

    def check(self, name: str, way: Way) -> float:
        layer, last, width = LAYERS - 1, slice(-CHECKED_ROWS, None), self.case.d
        self.out.fill_(float("nan"))
        self.pool.fill_(float("nan"))
        torch.cuda.synchronize()
        way(layer)
        kept = self.target >= 0
        place = self.target[kept].long()
        pages = self.pool[place // PAGE_TOKENS, layer, :, place % PAGE_TOKENS].flatten(2)
        states = self.out.view(-1, 4, width)[kept][:, [3, 1]]
        if not torch.equal(pages, states) or int(torch.isfinite(self.pool).sum()) != states.numel():
            sys.exit(f"{self.case.name}, {name}: its pages are wrong; no report")
        product = self.a[last].float() @ self.weights[layer].float() + self.bias.float()
        return self.held(name, self.out[last], torch.nn.functional.silu(product))


class OutputProblem(Problem):
    def __init__(self, case: Case, seed: int) -> None:
        super().__init__(case, seed)
        self.kernel = ResidualKernel(case.d, case.d, torch.bfloat16, self.device)

    def ways(self) -> dict[str, Way]:
        def ours(layer: int, tile: Tile | None) -> None:
            self.kernel.run(self.out, self.a, self.weights[layer], tile=tile)

        def library(layer: int) -> None:
            self.out.addmm_(self.a, self.weights[layer])

        return self.tiles(ours) | {"torch.addmm": library}

    def check(self, name: str, way: Way) -> float:
        last = slice(-CHECKED_ROWS, None)
        self.out.normal_(generator=self._generator)
        expected = self.out[last].float() + self.a[last].float() @ self.weights[0].float()
        torch.cuda.synchronize()
        way(0)
        return self.held(name, self.out[last], expected)


def name_of(tile: Tile) -> str:
    return f"{tile.rows}x{tile.columns}"


def time_ms(way: Way) -> float:
    graph = torch.cuda.CUDAGraph()
    way(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for turn in range(LAUNCHES):
            way(turn % LAYERS)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)


def bench(case: Case, seed: int) -> dict[str, Any]:
    problem = (ProjectionProblem if case.kind == "projection" else OutputProblem)(case, seed)
    ways = problem.ways()
    errors = {name: problem.check(name, way) for name, way in ways.items()}
    times = {name: time_ms(way) for name, way in ways.items()}
    times["torch.mm alone"] = time_ms(problem.product_alone)
    return {
        "shape": case.name, "rows": case.rows, "depth": case.d, "columns": case.columns,
        "floor_ms": round(case.floor_ms, 5), "tile": name_of(tile_of(case.rows, case.columns, case.d, sms())),
        "ms": {name: round(ms, 5) for name, ms in times.items()}, "relative_l2": errors,
        "tflops": round(case.flop / times["ours"] / 1e9, 1),
    }  # fmt: skip


def sms() -> int:
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["ours", *(name_of(tile) for tile in TILES), "torch.addmm", "torch.mm alone"]
    lines = [
        f"| us: shape | floor | {' | '.join(columns)} | tile | TFLOP/s | rel. L2 |",
        "| --- " * (len(columns) + 5) + "|",
    ]
    for row in rows:
        times = [f"{1e3 * row['ms'][name]:.1f}" if name in row["ms"] else "-" for name in columns]
        lines.append(
            f"| {row['shape']} | {1e3 * row['floor_ms']:.1f} | {' | '.join(times)} | {row['tile']} "
            f"| {row['tflops']:.0f} | {row['relative_l2']['ours']:.1e} |"
        )
    return "\n".join(lines)


def main() -> int:
    options = make_parser(__doc__, seed=True, cases=True).parse_args()
    require_gpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for case in CASES:
        if options.only in case.name:
            rows.append(bench(case, options.seed))
            torch.cuda.empty_cache()
    if not rows:
        sys.exit(f"no case's name contains {options.only!r}")
    print(table(rows))
    if options.out:
        report = {"benchmark": "product", "rows": rows, **stamp(seed=options.seed, device="cuda:0")}
        write_report(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
