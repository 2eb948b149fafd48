"""Times the layers of whole models on the GPU: cached (history in pages) and full (everything encoded).

    python benchmarks/bench_forward.py --out forward.json [--only hstu-512]

Each shape is checked first: the last slot's candidates against an fp32 forward of the same weights, tokens
and states, and its error held to 1.2 times that of plain torch in bf16. A shape that fails is not reported, and
the exit status is 1. Times are medians of CUDA graph replays of the layers alone, as public stacks are timed.
The floor is max(FLOP / 600e12, bytes / 4.2e12) (the counting of docs/architecture.md).
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import make_parser, require_gpu, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.config import ModelConfig  # noqa: E402
from mtserve.engine.forward.batch import BatchPlan, BatchSize  # noqa: E402
from mtserve.engine.forward.metadata import Capacity, Metadata, bucket_rows  # noqa: E402
from mtserve.engine.forward.stack import Stack  # noqa: E402
from mtserve.kernels.backend import load_kernels  # noqa: E402
from mtserve.kernels.plan import HostPlan, KernelPlan  # noqa: E402
from mtserve.model.mask import Groups, visible_limits  # noqa: E402
from mtserve.model.presets import build  # noqa: E402
from mtserve.model.ranking import RankingModel  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402

PAGE_TOKENS = 64
REPLAYS, LIMIT = 30, 1.2


@dataclass(frozen=True)
class Case:
    """`users` users of `history` tokens, `static` of them in U + S; `new` of them not cached, or all when `full`."""

    model: str
    users: int
    history: int
    new: int
    candidates: int
    full: bool
    static: int = 0
    public_ms: float | None = None
    target_ms: float | None = None

    @property
    def cached(self) -> int:
        return 0 if self.full else self.history

    @property
    def delta(self) -> int:
        return self.history + self.new if self.full else self.new

    @property
    def name(self) -> str:
        kind = "full" if self.full else "cached"
        return f"{kind} {self.model} B{self.users} L{self.history} new{self.new} N{self.candidates}"


def cases() -> list[Case]:
    """The rows of the performance table, then MTGR and long histories."""
    rows = [
        Case("hstu-512", 1, 4096, 128, 256, False, public_ms=1.63, target_ms=0.35),
        Case("hstu-512", 8, 4096, 128, 256, False, public_ms=1.98, target_ms=0.85),
        Case("hstu-1024", 8, 4096, 128, 256, False, public_ms=2.95, target_ms=1.7),
        Case("hstu-512", 8, 1024, 128, 256, False, public_ms=0.84, target_ms=0.40),
        Case("hstu-512", 8, 4096, 128, 256, True, public_ms=5.66, target_ms=5.0),
        Case("hstu-1024", 8, 4096, 128, 256, True, public_ms=12.4, target_ms=11.0),
        Case("hstu-512", 1, 4096, 128, 256, True, public_ms=1.02),
        Case("hstu-512", 8, 1024, 128, 256, True, public_ms=1.40),
    ]
    for name in ("mtgr-small", "mtgr-middle", "mtgr-large"):
        for users in (1, 8, 32):
            rows += [Case(name, users, 1000, 100, 128, full, static=1000) for full in (False, True)]
    for history in (4096, 10_240, 19_328):
        rows += [Case("kuairand", 8, history, 128, 512, full) for full in (False, True)]
    return rows


def plan_of(case: Case, config: ModelConfig, users: int, rng: np.random.Generator) -> HostPlan:
    """The plan of the first `users` users, on pages scattered at random."""
    rows = case.delta + case.candidates
    groups = Groups(0, case.static, case.history + case.new - case.static)
    limits = visible_limits(groups, config.static_attention, case.cached, case.cached + case.delta)
    limit = np.concatenate((limits, np.full(case.candidates, groups.prefix)))
    width = -(-case.cached // PAGE_TOKENS)
    pages = rng.permutation(case.users * width).astype(np.int32).reshape(case.users, width)[:users]
    first = np.arange(users) * rows
    slots = np.stack((np.full(users, case.cached), np.full(users, case.delta), first, np.full(users, rows)), axis=1)
    candidate = case.delta + np.arange(case.candidates)
    label = np.repeat([1, 2, 3], [max(0, case.static - case.cached), 0, 0])
    group = np.concatenate((label, np.full(case.delta - len(label), 2), np.full(case.candidates, 3)))
    return HostPlan(
        page_tokens=PAGE_TOKENS,
        slots=slots.astype(np.int32),
        page_table=pages,
        limit=np.tile(limit, users).astype(np.int32),
        group=np.tile(group, users).astype(np.int32),
        target=np.full(users * rows, -1, dtype=np.int32),
        candidate_rows=(first[:, None] + candidate).ravel(),
    )


def one_slot(plan: HostPlan, case: Case) -> HostPlan:
    """The plan of the last slot alone, on the same pages."""
    rows = case.delta + case.candidates
    return HostPlan(
        page_tokens=PAGE_TOKENS,
        slots=np.array([[case.cached, case.delta, 0, rows]], dtype=np.int32),
        page_table=plan.page_table[-1:],
        limit=plan.limit[-rows:],
        group=plan.group[-rows:],
        target=np.full(rows, -1, dtype=np.int32),
        candidate_rows=np.arange(case.delta, rows),
    )


def floor_ms(case: Case, config: ModelConfig, plan: HostPlan) -> float:
    """max(FLOP / 600e12, bytes / 4.2e12) of the layers, in ms."""
    width, rows = config.heads * config.head_dim, plan.rows
    flop = rows * (2 * config.d * 4 * width + 2 * width * config.d) + 4 * width * int(plan.limit.astype(np.int64).sum())
    states = 2 * width * 2 * case.cached * case.users
    weights = 2 * 5 * config.d * width
    moved = states + weights + rows * 2 * 2 * config.d
    return config.layers * max(flop / 600e12, moved / 4.2e12) * 1e3


def relative_l2(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.float() - truth).norm() / truth.norm())


def check(
    case: Case,
    model: RankingModel,
    exact: RankingModel,
    pool: torch.Tensor,
    plan: HostPlan,
    x: torch.Tensor,
    got: torch.Tensor,
) -> tuple[float, float]:
    """Relative L2 of the last slot's candidates from fp32: ours, and plain torch's in bf16."""
    single = one_slot(plan, case)
    rows = x[-single.rows :]
    kernel = KernelPlan.of(single, x.device)
    eager = load_kernels("eager")
    scored = kernel.candidate_rows
    needed = pool if case.cached else None
    ids = torch.from_numpy(single.page_table.ravel().astype(np.int64)).to(x.device)
    truth_pool = None if needed is None else pool.index_select(0, ids).float()
    local = HostPlan(**{**single.__dict__, "page_table": np.arange(ids.numel(), dtype=np.int32)[None]})
    truth = exact.encode(rows.float(), truth_pool, KernelPlan.of(local, x.device), eager)[scored]
    plain = model.encode(rows.clone(), needed, kernel, eager)[scored]
    return relative_l2(got[-case.candidates :], truth), relative_l2(plain, truth)


class Layers:
    """The layers of one model over one plan, captured as the engine captures them."""

    def __init__(
        self, model: RankingModel, pool: torch.Tensor, plan: HostPlan, case: Case, deterministic: bool
    ) -> None:
        capacity = Capacity.of(model.schema, plan.rows, case.users, plan.page_table.shape[1])
        self.stack = Stack(model, pool, PAGE_TOKENS, capacity.rows, deterministic=deterministic)
        metadata = Metadata(capacity, model.device)
        self.bucket = bucket_rows(plan.rows)
        arrays = metadata.room(self.bucket)
        arrays.slots[: case.users] = plan.slots
        arrays.page_table[: case.users, : plan.page_table.shape[1]] = plan.page_table
        for name, nothing in (("limit", 0), ("group", 0), ("target", -1)):
            getattr(arrays, name)[: plan.rows], getattr(arrays, name)[plan.rows :] = getattr(plan, name), nothing
        size = BatchSize(plan.rows, case.users, plan.page_table.shape[1], 0, 0)
        work = metadata.plan_attention(
            self.bucket,
            BatchPlan(arrays, size, PAGE_TOKENS, 0, (0, plan.rows, plan.rows), ()),
            **self.stack.work_options,
        )
        device, pinned, _ = metadata.to_copy(self.bucket, 0)
        device.copy_(pinned)
        self.tile_rows, self.splits = work.tile_rows, work.max_splits
        direct = work.max_splits <= 1 and not deterministic
        assert work.max_splits <= self.stack.max_splits(self.bucket)
        self.stack.run(self.bucket, metadata, work.tile_rows, direct=direct)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.stack.run(self.bucket, metadata, work.tile_rows, direct=direct)
        self._metadata = metadata  # keeps the memory that the graph reads

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """[T, d] rows after all layers."""
        self.stack.buffers.x[: len(x)] = x
        self._graph.replay()
        return self.stack.buffers.x[: len(x)].float() + self.stack.final_offset

    def median_ms(self, x: torch.Tensor) -> float:
        """Median of graph replays, each on fresh tokens."""
        times = []
        for _ in range(REPLAYS):
            self.stack.buffers.x[: len(x)] = x
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[len(times) // 2]


@torch.inference_mode()
def measure(case: Case, model: RankingModel, exact: RankingModel, seed: int) -> dict[str, Any]:
    """One row of the table; raises AssertionError when the check fails."""
    config, rng = model.config, np.random.default_rng(seed)
    torch.manual_seed(seed)
    width = -(-case.cached // PAGE_TOKENS)
    sizes = (max(1, case.users * width), config.layers, 2, PAGE_TOKENS, config.heads, config.head_dim)
    pool = torch.randn(sizes, device="cuda", dtype=model.dtype).mul_(0.3)
    plan = plan_of(case, config, case.users, rng)
    x = torch.randn(plan.rows, config.d, device="cuda", dtype=model.dtype)
    layers = Layers(model, pool, plan, case, deterministic=False)
    got = layers.run(x).index_select(0, torch.from_numpy(plan.candidate_rows).cuda())
    ours, plain = check(case, model, exact, pool, plan, x, got)
    assert ours <= LIMIT * plain, f"{case.name}: relative L2 {ours:.2e} from fp32, plain torch has {plain:.2e}"
    time_ms, floor = layers.median_ms(x), floor_ms(case, config, plan)
    fixed_ms = Layers(model, pool, plan, case, deterministic=True).median_ms(x)
    return {
        "case": case.name, "ms": time_ms, "floor_ms": floor, "public_ms": case.public_ms, "target_ms": case.target_ms,
        "deterministic_ms": fixed_ms, "relative_l2": ours, "plain_relative_l2": plain,
        "rows": layers.bucket, "tile_rows": layers.tile_rows, "splits": layers.splits,
    }  # fmt: skip


def main() -> int:
    options = make_parser(__doc__, "forward.json", seed=True, cases=True).parse_args()
    require_gpu()
    results: list[dict[str, Any]] = []
    failed = 0
    name, model, exact = "", None, None
    print(f"{'shape':<46} {'ms':>8} {'floor':>8} {'public':>8} {'target':>8} {'determ.':>8}  relative L2 (plain torch)")
    for case in cases():
        if options.only not in case.name:
            continue
        if case.model != name:
            name = case.model
            exact = build(name, seed=options.seed).cuda()
            model = copy.deepcopy(exact).to(torch.bfloat16)
        assert model is not None and exact is not None
        try:
            row = measure(case, model, exact, options.seed)
        except AssertionError as error:
            failed += 1
            print(f"FAILED {error}", flush=True)
            continue
        results.append(row)
        public, target = (f"{value:.3f}" if value else "-" for value in (case.public_ms, case.target_ms))
        print(f"{case.name:<46} {row['ms']:8.3f} {row['floor_ms']:8.3f} {public:>8} {target:>8} {row['deterministic_ms']:8.3f}  {row['relative_l2']:.2e} ({row['plain_relative_l2']:.2e})", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    report = {
        "stamp": stamp(seed=options.seed, device="cuda:0"),
        "dtype": "bfloat16",
        "failed": failed,
        "results": results,
    }
    write_report(report, options.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
