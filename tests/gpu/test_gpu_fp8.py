"""Pages of fp8 on Hopper: the projection rounds K and V as torch does, and the attention sees the same numbers in pages.

All that is no token's holds NaN, which fp8 has, too; lengths are odd.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_world import Pending, World
from kernel_plans import Batch, Shape, make_batch
from small_models import CAUSAL, small_model

from mtserve.kernels.attention.cuda import attention, tile_rows_of
from mtserve.kernels.attention.eager import attention as eager_attention
from mtserve.kernels.page_write.rounding import FP8, movable, rounded
from mtserve.kernels.product.cuda import TILES, Tile
from mtserve.kernels.projection_silu.cuda import ProjectionKernel
from mtserve.model.ranking import RankingModel

pytestmark = pytest.mark.gpu
N, PAGE = 50, 64
ODD = [Shape(0, 0, 3), Shape(1, 5, 1), Shape(63, 64, 0), Shape(64, 0, 70), Shape(65, 100, 290), Shape(0, 0, 0),
       Shape(500, 1, 129), Shape(0, 300, 17), Shape(321, 7, 0), Shape(1500, 33, 200)]  # fmt: skip
CUTS: list[dict[str, Any]] = [{}, {"pieces": 1}, {"pieces": 5}, {"pieces": 16}, {"deterministic": True}]
BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def make(shapes: list[Shape], *, head_dim: int, dtype: torch.dtype, mask: str = "causal", **options: Any) -> Batch:
    """A batch whose pages have fp8's numbers in `dtype`; q, k, v are sections of one projection, u NaN."""
    batch = make_batch(
        shapes, mask=mask, page_tokens=PAGE, heads=3, head_dim=head_dim, dtype=dtype, device="cuda", **options
    )
    k, v = rounded(batch.k, FP8), rounded(batch.v, FP8)
    uvqk = torch.stack((torch.full_like(batch.q, float("nan")), v, batch.q, k), dim=1)
    return replace(batch, q=uvqk[:, 2], k=uvqk[:, 3], v=uvqk[:, 1], pages=rounded(batch.pages, FP8))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.float() - expected).norm() / expected.norm())


@BOTH
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal", "random"])
def test_attention_over_fp8_pages_has_the_bits_of_that_over_the_same_numbers(
    mask: str, head_dim: int, dtype: torch.dtype
) -> None:
    batch = make(ODD, mask=mask, head_dim=head_dim, dtype=dtype, seed=1)
    expected = eager_attention(batch.q.float(), batch.k.float(), batch.v.float(), batch.pages.float(), batch.plan, N)
    plain = error(eager_attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N), expected)
    for tile_rows in (0, *tile_rows_of(head_dim)):
        for cut in CUTS:
            options = {**cut, "tile_rows": tile_rows}
            native = attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N, **options)
            got = attention(batch.q, batch.k, batch.v, batch.pages.to(FP8), batch.plan, N, **options)
            assert error(got, expected) <= 1.2 * plain
            assert torch.equal(got, native)


@pytest.mark.parametrize("seed", range(12))
def test_attention_over_fp8_pages_of_random_jagged_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [Shape(*(int(x) for x in rng.integers(0, (2500, 300, 300)))) for _ in range(rng.integers(1, 12))]
    batch = make(shapes, head_dim=int(rng.choice([32, 64, 128, 256])), dtype=torch.bfloat16, seed=seed)
    options = CUTS[seed % len(CUTS)]
    native = attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N, **options)
    pages = batch.pages.to(FP8)
    for _ in range(5):  # a race would not show each time
        assert torch.equal(attention(batch.q, batch.k, batch.v, pages, batch.plan, N, **options), native)


@BOTH
def test_every_number_of_the_format_comes_back_as_it_is(dtype: torch.dtype) -> None:
    """One key a token with weight 1/n SiLU(q k): the sums give each value of V away."""
    batch = make([Shape(64, 0, 1)], head_dim=64, dtype=dtype, mask="full", seed=0)
    page = int(batch.plan.page_table[0, 0])
    numbers = torch.arange(256, dtype=torch.uint8, device="cuda").view(FP8).to(dtype)
    numbers = torch.where(numbers.isfinite(), numbers, 0.0)
    batch.plan.limit[:] = 1
    for first in range(0, 256, 64):
        pages = torch.zeros_like(batch.pages)
        pages[page, 0, 0] = 1.0
        pages[page, 1, 0] = numbers[first : first + 64]
        uvqk = torch.zeros(1, 4, 3, 64, dtype=dtype, device="cuda")
        uvqk[:, 2] = 0.5
        native = attention(uvqk[:, 2], uvqk[:, 3], uvqk[:, 1], pages, batch.plan, 1)
        got = attention(uvqk[:, 2], uvqk[:, 3], uvqk[:, 1], pages.to(FP8), batch.plan, 1)
        assert torch.equal(got, native)
        assert torch.equal(got.sign(), pages[page, 1, 0].sign()[None])


class Projection:
    """One projection over NaN-poisoned pages of fp8."""

    def __init__(self, rows: int, d: int, width: int, dtype: torch.dtype) -> None:
        torch.manual_seed(7)
        self.rows, self.width, device = rows, width, torch.device("cuda", torch.cuda.current_device())

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, device=device)).to(dtype)

        self.x, self.weight, self.bias = random(rows, d), random(d, 4 * width, scale=d**-0.5), random(4 * width)
        pages = rows // PAGE + 3
        self.native = torch.full((pages, 3, 2, PAGE, 1, width), float("nan"), dtype=dtype, device=device)
        self.pool = self.native.to(FP8)
        places = torch.randperm(pages * PAGE, device=device)[:rows]
        self.target = torch.where(torch.rand(rows, device=device) < 0.3, -1, places).to(torch.int32)
        torch.cuda.synchronize()

    def run(self, pool: torch.Tensor, tile: Tile) -> torch.Tensor:
        """[rows, 4, width] u, v, q, k."""
        kernel = ProjectionKernel(len(self.weight), self.width, self.x.dtype, PAGE, 3, pool, self.x.device)
        mixed = torch.full((self.rows, 4 * self.width), float("nan"), dtype=self.x.dtype, device=self.x.device)
        torch.cuda.synchronize()
        kernel.run(self.x, self.weight, self.bias, self.target, mixed, 1, tile=tile)
        return mixed.view(self.rows, 4, self.width)


@BOTH
@pytest.mark.parametrize(("d", "width"), [(64, 32), (96, 96), (512, 160), (72, 40), (512, 512)])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
def test_the_projection_rounds_what_it_keeps(tile: Tile, d: int, width: int, dtype: torch.dtype) -> None:
    for rows in (1, 63, 64, 65, 191, 700):
        case = Projection(rows, d, width, dtype)
        native, got = case.run(case.native, tile), case.run(case.pool, tile)
        assert torch.equal(got[:, 0::2], native[:, 0::2])  # u and q
        states = got[:, 1::2]
        assert torch.equal(rounded(states, FP8), states)
        # The nearest number, but that here a sum is rounded once, and natively once before.
        off = (states - native[:, 1::2]).float().abs()
        step = torch.exp2(native[:, 1::2].float().abs().clamp_min(2.0**-6).log2().floor() - 3)
        assert (off <= 0.54 * step).all()
        assert error(states, rounded(native[:, 1::2], FP8).float()) < 0.03
        expected = torch.full_like(case.native, float("nan")).to(FP8)
        kept = case.target >= 0
        page, offset = (case.target[kept] // PAGE).long(), (case.target[kept] % PAGE).long()
        for side, part in enumerate((3, 1)):
            movable(expected)[page, 1, side, offset, 0] = movable(got[kept, part].to(FP8))
        assert torch.equal(movable(case.pool), movable(expected))


def model_of(head_dim: int) -> RankingModel:
    sizes = {"layers": 4, "d": 96, "heads": 2, "head_dim": head_dim, "max_history": 600, "attention_length": 512}
    return small_model(**{**sizes, "max_realtime": 600, **CAUSAL})


def finish(w: World, pending: Sequence[Pending]) -> None:
    """Answer these, and let write-backs end: between them the loop may have nothing to do but to wait for copies."""
    end = time.monotonic() + 60
    while not all(each.future.done() for each in pending) or w.engine._core.busy():
        w.step()
        assert time.monotonic() < end


def relative_l2(pending: Sequence[Pending]) -> float:
    got = np.concatenate([each.future.result(timeout=0).logits for each in pending])
    expected = np.concatenate([each.expected() for each in pending])
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_scores_through_both_tiers_are_those_of_a_recompute_that_rounds(head_dim: int, deterministic: bool) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "page_tokens": 64, "gpu_format": "fp8"}
    sizes: dict[str, Any] = {"gpu_pages": 22, "host_pages": 80, "restore": "load"}
    eager = World(model_of(head_dim), kernels="eager", **options, **sizes)
    w = World(model_of(head_dim), deterministic=deterministic, **options, **sizes)
    assert w.engine._core.kernels == "cuda"
    errors: dict[str, list[float]] = {"eager": [], "cuda": []}
    for name, each in (("eager", eager), ("cuda", w)):
        for user in "abc":
            each.put(user, 380)
        for turn in range(4):
            each.append("a", 5 + 40 * turn)
            pending = [each.submit(user, 64) for user in "abc"]
            finish(each, pending)
            errors[name].append(relative_l2(pending))
            for filler in ("x", "y", "z"):
                if filler not in each.rows:
                    each.put(filler, 500)
                finish(each, [each.submit(filler)])
        assert each.value("load_bytes_total") > 0
        each.engine.close()
        each.engine.check()
    assert max(errors["cuda"]) <= 1.5 * max(errors["eager"])
