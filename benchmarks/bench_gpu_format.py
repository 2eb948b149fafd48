"""What gpu_format fp8 brings and costs on one GPU: attention and whole layers beside those over bf16 pages, and errors.

    python benchmarks/bench_gpu_format.py --out gpu_format.json [--only "cached B8"]

Attention: the cached cases of bench_attention.py, each checked against fp32 over the pool's own numbers. Layers: cases
of bench_forward.py as captured graphs, checked on the last slot's candidates: in fp8 against an fp32 forward that
rounds K and V in the same places, with at most 1.2 times the error of plain torch in bf16. `error` is the distance
from the fp32 forward that rounds nothing, over pages that nothing has rounded. A wrong result means no report.
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

import bench_attention  # noqa: E402
from bench_forward import LIMIT, PAGE_TOKENS, Case, Layers, one_slot, plan_of, relative_l2  # noqa: E402

from mtserve.kernels.backend import load_kernels  # noqa: E402
from mtserve.kernels.page_write.rounding import FP8, movable  # noqa: E402
from mtserve.kernels.plan import HostPlan, KernelPlan  # noqa: E402
from mtserve.model.presets import build  # noqa: E402
from mtserve.model.ranking import RankingModel  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402

FORMATS = {"native": torch.bfloat16, "fp8": FP8}
CASES = (
    Case("hstu-512", 1, 4096, 128, 256, False),
    Case("hstu-512", 8, 1024, 128, 256, False),
    Case("hstu-512", 8, 4096, 128, 256, False),
    Case("hstu-512", 32, 4096, 128, 256, False),
    Case("hstu-512", 8, 4096, 128, 256, True),
    Case("hstu-1024", 8, 4096, 128, 256, False),
    Case("mtgr-small", 8, 1000, 100, 128, False, static=1000),
)


@dataclass(frozen=True)
class Checked:
    """The last slot of a batch in fp32 and in plain torch: candidates' rows after all layers."""

    kernel: KernelPlan
    local: KernelPlan
    ids: torch.Tensor
    rows: torch.Tensor
    scored: torch.Tensor

    @classmethod
    def of(cls, case: Case, plan: HostPlan, x: torch.Tensor) -> Checked:
        single = one_slot(plan, case)
        ids = torch.from_numpy(single.page_table.ravel().astype(np.int64)).to(x.device)
        local = HostPlan(**{**single.__dict__, "page_table": np.arange(ids.numel(), dtype=np.int32)[None]})
        kernel = KernelPlan.of(single, x.device)
        return cls(kernel, KernelPlan.of(local, x.device), ids, x[-single.rows :], kernel.candidate_rows)

    def truth(self, exact: RankingModel, pool: torch.Tensor, pages: torch.dtype) -> torch.Tensor:
        """In fp32, over the pages of `pool`, as pages of `pages`."""
        mine = movable(pool).index_select(0, self.ids).view(pool.dtype).float().to(pages)
        return exact.encode(self.rows.float(), mine, self.local, load_kernels("eager"))[self.scored]

    def plain(self, model: RankingModel, pool: torch.Tensor) -> torch.Tensor:
        return model.encode(self.rows.clone(), pool, self.kernel, load_kernels("eager"))[self.scored]


@torch.inference_mode()
def measure(case: Case, model: RankingModel, exact: RankingModel, seed: int) -> dict[str, Any]:
    """Both formats of one shape; exits when a check fails."""
    config, rng = model.config, np.random.default_rng(seed)
    torch.manual_seed(seed)
    width = -(-case.cached // PAGE_TOKENS)
    sizes = (max(1, case.users * width), config.layers, 2, PAGE_TOKENS, config.heads, config.head_dim)
    original = torch.randn(sizes, device="cuda", dtype=model.dtype).mul_(0.3)
    plan = plan_of(case, config, case.users, rng)
    x = torch.randn(plan.rows, config.d, device="cuda", dtype=model.dtype)
    slot = Checked.of(case, plan, x)
    unrounded = slot.truth(exact, original, torch.float32)
    scored = torch.from_numpy(plan.candidate_rows).cuda()
    row: dict[str, Any] = {"case": case.name}
    for name, dtype in FORMATS.items():
        pool = original.to(dtype)
        layers = Layers(model, pool, plan, case, deterministic=False)
        got = layers.run(x).index_select(0, scored)[-case.candidates :]
        truth = slot.truth(exact, pool, FP8) if name == "fp8" else unrounded
        ours, plain = relative_l2(got, truth), relative_l2(slot.plain(model, pool), truth)
        if not ours <= LIMIT * plain:
            sys.exit(f"{case.name}, {name}: relative L2 {ours:.2e} from fp32, plain torch has {plain:.2e}; no report")
        page_bytes = pool[:1].nbytes
        pages = -(-(case.history + case.new) // PAGE_TOKENS)
        row[name] = {
            "ms": layers.median_ms(x),
            "deterministic_ms": Layers(model, pool, plan, case, deterministic=True).median_ms(x),
            "error": relative_l2(got, unrounded),
            "from_its_truth": ours,
            "plain_from_its_truth": plain,
            "page_bytes": page_bytes,
            "users_per_gib": round(2**30 / (pages * page_bytes), 1),
        }
    return row


def measure_attention(case: bench_attention.Case, seed: int) -> dict[str, Any]:
    """One layer's attention over both kinds of pages."""
    row: dict[str, Any] = {"case": case.name}
    for name, dtype in FORMATS.items():
        problem = bench_attention.Problem(case, seed, dtype)
        row[name] = bench_attention.measure(problem)
        row[name]["deterministic_ms"] = bench_attention.measure(problem, deterministic=True)["ms"]
        del problem
        torch.cuda.empty_cache()
    return row


def line(row: dict[str, Any], error: str) -> str:
    native, fp8 = row["native"], row["fp8"]
    users = f" {native['users_per_gib']:.1f} -> {fp8['users_per_gib']:.1f} users/GiB" if "users_per_gib" in fp8 else ""
    return (
        f"{row['case']:<44} bf16 {native['ms']:.4f} ms, fp8 {fp8['ms']:.4f} ms ({fp8['ms'] / native['ms'] - 1:+.0%}), "
        f"deterministic {native['deterministic_ms']:.4f} and {fp8['deterministic_ms']:.4f}; "
        f"relative L2 {native[error]:.1e} and {fp8[error]:.1e}{users}"
    )


def layer_rows(only: str, seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    name, model, exact = "", None, None
    for case in CASES:
        if only not in case.name:
            continue
        if case.model != name:
            name = case.model
            exact = build(name, seed=seed).cuda()
            model = copy.deepcopy(exact).to(torch.bfloat16)
        assert model is not None and exact is not None
        rows.append(measure(case, model, exact, seed))
        print(line(rows[-1], "error"), flush=True)
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    options = make_parser(__doc__, "gpu_format.json", seed=True, cases=True).parse_args()
    require_gpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    attention = []
    for case in bench_attention.CASES:
        if options.only in case.name and case.cached:
            attention.append(measure_attention(case, options.seed))
            print(line(attention[-1], "relative_l2"), flush=True)
    layers = layer_rows(options.only, options.seed)
    if not attention and not layers:
        sys.exit(f"no case's name contains {options.only!r}")
    report = {"stamp": stamp(seed=options.seed, device="cuda:0"), "attention": attention, "layers": layers}
    write_report(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
