"""The cuda attention on Hopper, held to fp32: every mask, width, type and cut, over NaN-poisoned pages.

The contract: its relative L2 error against fp32 is at most 1.2 times that of plain torch in the same type.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_plans import Batch, Shape, make_batch

from mtserve.errors import InvalidArgument
from mtserve.kernels.attention.cuda import AttentionKernel, attention, tile_rows_of
from mtserve.kernels.attention.eager import attention as eager_attention
from mtserve.kernels.attention.work import build_work

pytestmark = pytest.mark.gpu
N = 50
PAGE = 64
ODD = [Shape(0, 0, 3), Shape(1, 5, 1), Shape(63, 64, 0), Shape(64, 0, 70), Shape(65, 100, 290), Shape(0, 0, 0),
       Shape(500, 1, 129), Shape(0, 300, 17), Shape(321, 7, 0)]  # fmt: skip
MASKS = ["full", "causal", "random"]
CUTS: list[dict[str, Any]] = [
    {},
    {"pieces": 1},
    {"pieces": 2},
    {"pieces": 5},
    {"pieces": 16},
    {"deterministic": True},
    {"deterministic": True, "pieces": 1},
]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def make(shapes: list[Shape], *, mask: str, head_dim: int, dtype: torch.dtype, seed: int = 0, heads: int = 3) -> Batch:
    """A batch whose q, k, v are sections of one projection, u NaN."""
    batch = make_batch(
        shapes, mask=mask, page_tokens=PAGE, heads=heads, head_dim=head_dim, seed=seed, dtype=dtype, device="cuda"
    )
    uvqk = torch.stack((torch.full_like(batch.q, float("nan")), batch.v, batch.q, batch.k), dim=1)
    _, v, q, k = uvqk.unbind(1)
    return replace(batch, q=q, k=k, v=v)


def run(batch: Batch, **options: Any) -> torch.Tensor:
    return attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N, **options)


def expected_of(batch: Batch) -> torch.Tensor:
    return eager_attention(batch.q.float(), batch.k.float(), batch.v.float(), batch.pages.float(), batch.plan, N)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.float() - expected).norm() / expected.norm())


def assert_as_good_as_torch(batch: Batch, **options: Any) -> None:
    expected = expected_of(batch)
    plain = eager_attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N)
    got = run(batch, **options)
    assert got.shape == expected.shape
    assert got.dtype == batch.q.dtype
    assert error(got, expected) <= 1.2 * error(plain, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_width_and_type(mask: str, head_dim: int, dtype: torch.dtype) -> None:
    batch = make(ODD, mask=mask, head_dim=head_dim, dtype=dtype)
    for cut in CUTS:
        assert_as_good_as_torch(batch, **cut)
        for tile_rows in tile_rows_of(head_dim):
            assert_as_good_as_torch(batch, tile_rows=tile_rows, **cut)


@pytest.mark.parametrize("seed", range(12))
def test_random_jagged_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [Shape(*(int(x) for x in rng.integers(0, (900, 300, 200)))) for _ in range(rng.integers(1, 9))]
    head_dim = int(rng.choice([32, 64, 128, 256]))
    batch = make(shapes, mask=MASKS[seed % 3], head_dim=head_dim, dtype=torch.bfloat16, seed=seed, heads=1 + seed % 5)
    assert_as_good_as_torch(batch, **CUTS[seed % len(CUTS)])


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_deterministic_scores_are_bit_equal_from_run_to_run_and_in_any_company(head_dim: int) -> None:
    batch = make(ODD, mask="random", head_dim=head_dim, dtype=torch.bfloat16, seed=3)
    first = run(batch, deterministic=True)
    for _ in range(3):
        assert torch.equal(run(batch, deterministic=True), first)
    for tile_rows in tile_rows_of(head_dim):
        for pieces in (0, 1):
            assert torch.equal(run(batch, deterministic=True, tile_rows=tile_rows, pieces=pieces), first)
    plan = batch.plan
    for slot, (begin, end) in enumerate(zip(plan.row_offsets, plan.row_offsets[1:], strict=False)):
        rows = slice(begin, end)
        uvqk = torch.stack((batch.q[rows] * float("nan"), batch.v[rows], batch.q[rows], batch.k[rows]), dim=1)
        alone = replace(
            plan, row_offsets=(0, end - begin), cached=(plan.cached[slot],), delta=(plan.delta[slot],),
            page_table=plan.page_table[slot : slot + 1], limit=plan.limit[rows], group=plan.group[rows],
        )  # fmt: skip
        got = attention(uvqk[:, 2], uvqk[:, 3], uvqk[:, 1], batch.pages, alone, N, deterministic=True)
        assert torch.equal(got, first[rows])


def test_one_captured_graph_serves_other_batches_layers_apart() -> None:
    """Replays with other lengths in the same buffers; the layer's pages lie among those of others, which hold NaN."""
    heads, head_dim, capacity, layers = 2, 128, 700, 3
    device = torch.device("cuda", torch.cuda.current_device())
    batches = [
        make(shapes, mask="causal", head_dim=head_dim, dtype=torch.bfloat16, heads=heads, seed=5)
        for shapes in ([Shape(700, 30, 200)], [Shape(64, 300, 9), Shape(0, 0, 0), Shape(333, 1, 250)])
    ]
    pages = max(len(batch.pages) for batch in batches)
    pool = torch.full((pages, layers, 2, PAGE, heads, head_dim), float("nan"), device=device, dtype=torch.bfloat16)
    kernel = AttentionKernel(heads, head_dim, torch.bfloat16, PAGE, layers, pool, device)
    uvqk = torch.full((capacity, 4, heads, head_dim), float("nan"), device=device, dtype=torch.bfloat16)
    partial = torch.zeros(4, capacity, heads * head_dim, device=device)
    held = None
    graph = torch.cuda.CUDAGraph()
    for batch in batches:
        plan = batch.plan
        pool.fill_(float("nan"))
        pool[: len(batch.pages), 1] = batch.pages
        uvqk.fill_(float("nan"))
        uvqk[: plan.rows] = torch.stack((batch.q, batch.v, batch.q, batch.k), dim=1)
        slots = np.zeros((4, 4), np.int32)
        slots[:, 2] = plan.rows
        slots[: len(plan.cached)] = np.stack(
            [plan.cached, plan.delta, plan.row_offsets[:-1], np.diff(plan.row_offsets)], axis=1
        )
        table = torch.zeros(4, 16, dtype=torch.int32)
        table[: len(plan.cached), : plan.page_table.shape[1]] = plan.page_table.cpu()
        work, planned = build_work(
            slots, plan.limit.cpu().numpy(), table, heads=heads, head_dim=head_dim, sms=kernel.sms, device=device,
            pieces=4, tile_rows=128,
        )  # fmt: skip
        assert planned.max_splits == 4
        if held is None:
            room = replace(work, limit=work.limit.new_zeros(capacity), splits=work.splits.new_zeros(capacity),
                           work=work.work.new_zeros(200, 8))  # fmt: skip
            held = room
            kernel.run(uvqk, 1, held, partial, N)  # count is copied below; a warm-up of any size
            with torch.cuda.graph(graph):
                kernel.run(uvqk, 1, held, partial, N)
        held.slots.copy_(work.slots)
        held.page_table.copy_(work.page_table)
        held.limit[: plan.rows] = work.limit
        held.splits[: plan.rows] = work.splits
        held.work[: planned.items] = work.work[: planned.items]
        held.count.copy_(work.count)
        partial.fill_(float("nan"))
        for _ in range(2):
            graph.replay()
        used = torch.arange(4, device=device)[:, None] < held.splits[None]
        got = partial.masked_fill(~used[..., None], 0.0).sum(0)[: plan.rows].view(-1, heads, head_dim)
        assert error(got, expected_of(batch)) < 4e-3
        assert torch.isnan(partial[:, plan.rows :]).all()


def test_without_pages() -> None:
    batch = make([Shape(0, 130, 40)], mask="causal", head_dim=64, dtype=torch.bfloat16)
    got = attention(batch.q, batch.k, batch.v, None, batch.plan, N)
    assert error(got, expected_of(batch)) < 5e-3


def test_page_offsets_past_two_gigabytes_and_more() -> None:
    """The last pages of a pool of 9 GiB: offsets of one layer leave 32 bits behind."""
    free, _ = torch.cuda.mem_get_info()
    if free < 11 << 30:
        pytest.skip("needs 11 GiB of GPU memory")
    heads, head_dim = 4, 128
    batch = make([Shape(200, 20, 30)], mask="full", head_dim=head_dim, dtype=torch.bfloat16, heads=heads)
    count = (9 << 30) // (2 * PAGE * heads * head_dim * 2)
    pages = torch.empty(count, *batch.pages.shape[1:], device="cuda", dtype=torch.bfloat16)
    pages[-len(batch.pages) :] = batch.pages
    table = batch.plan.page_table + (count - len(batch.pages))
    plan = replace(batch.plan, page_table=table)
    got = attention(batch.q, batch.k, batch.v, pages, plan, N)
    assert error(got, expected_of(batch)) < 4e-3


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("page_tokens", {"page_tokens": 32}),
        ("head_dim", {"head_dim": 96}),
        ("dtype", {"dtype": torch.float32}),
        ("device", {"device": torch.device("cpu")}),
        ("pool", {"layers": 3}),
    ],
)
def test_what_the_kernel_cannot_do_is_named(field: str, change: dict[str, Any]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pool = torch.zeros(3, 2, 2, PAGE, 2, 64, device=device, dtype=torch.bfloat16)
    good: dict[str, Any] = {
        "heads": 2, "head_dim": 64, "dtype": torch.bfloat16, "page_tokens": PAGE, "layers": 2, "pool": pool,
        "device": device,
    }  # fmt: skip
    AttentionKernel(**good)
    with pytest.raises(InvalidArgument, match=f"^{field}: "):
        AttentionKernel(**{**good, **change})


def test_separate_tensors_are_refused() -> None:
    batch = make([Shape(0, 130, 40)], mask="causal", head_dim=64, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument, match=r"^q: "):
        attention(batch.q.clone(), batch.k, batch.v, None, batch.plan, N)
