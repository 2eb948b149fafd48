"""The packed pages that a forward writes beside the states, and forwards of some layers only, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_plans import Shape, make_batch
from small_models import small_model

from mtserve.kernels.backend import Kernels, load_kernels
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.host_format.reference import decode_rows, encode_rows
from mtserve.kernels.host_format.shape import FormatShape
from mtserve.kernels.plan import KernelPlan
from mtserve.model.ranking import RankingModel

LAYERS, PAGE_TOKENS, HEADS, HEAD_DIM, D = 3, 4, 2, 8, 32
ODD = [Shape(7, 5, 3), Shape(0, 9, 0), Shape(3, 0, 4), Shape(5, 1, 1)]
FORMATS = ["kv", "kv8", "x8", "x4"]


@dataclass(frozen=True)
class Forward:
    """A model, and a batch of it on a pool in which all that is no token's holds NaN."""

    model: RankingModel
    plan: KernelPlan
    x: torch.Tensor
    pool: torch.Tensor
    kernels: Kernels

    def packed(self, format: str) -> PackedPages:
        shape = FormatShape(format, LAYERS, PAGE_TOKENS, HEADS, HEAD_DIM, D, torch.float32)
        return PackedPages(shape, torch.full((len(self.pool), shape.bytes), 255, dtype=torch.uint8))

    def inputs(self, layer: int) -> torch.Tensor:
        """[T, d] rows as `layer` reads them."""
        return self.model.encode(self.x, self.pool.clone(), self.plan, self.kernels, last=layer)


@pytest.fixture(params=["eager", "reference"])
def forward(request: pytest.FixtureRequest) -> Forward:
    batch = make_batch(ODD, mask="causal", page_tokens=PAGE_TOKENS, heads=HEADS, head_dim=HEAD_DIM, seed=3)
    generator = torch.Generator().manual_seed(4)
    pool = torch.stack([batch.pages * scale for scale in (1.0, -0.5, 2.0)], dim=1)
    model = small_model(layers=LAYERS, d=D, heads=HEADS, head_dim=HEAD_DIM)
    x = torch.randn(batch.plan.rows, D, generator=generator)
    return Forward(model, batch.plan, x, pool, load_kernels(request.param))


@pytest.mark.parametrize("format", ["x8", "x4"])
def test_normalised_rows_are_packed(forward: Forward, format: str) -> None:
    packed, expected = forward.packed(format), forward.packed(format)
    forward.model.encode(forward.x, forward.pool.clone(), forward.plan, forward.kernels, packed)
    norm, reference = forward.kernels.group_layer_norm, load_kernels("reference").group_layer_norm
    target = forward.plan.target
    for index, layer in enumerate(forward.model.layers):
        arguments = forward.inputs(index), layer.norm_weight, layer.norm_bias, forward.plan.group
        encode_rows(expected.shape, (norm(*arguments),), expected.pages, target, index)
        truth, back = reference(*arguments), torch.full_like(forward.x, float("nan"))
        rows = torch.arange(len(back), dtype=torch.int32)
        decode_rows(packed.shape, packed.pages, target, index, back, rows)
        kept = forward.plan.write_rows
        assert back[kept].isfinite().all() and int(back.isnan().all(1).sum()) == len(back) - len(kept)
        half_a_code = 0.51 / packed.shape.levels * truth[kept].abs().amax(1, keepdim=True)
        assert ((back - truth)[kept].abs() <= half_a_code).all()
    assert torch.equal(packed.pages, expected.pages)


@pytest.mark.parametrize("format", ["kv", "kv8"])
def test_states_are_packed_as_their_pages_have_them(forward: Forward, format: str) -> None:
    packed, expected, pool = forward.packed(format), forward.packed(format), forward.pool.clone()
    forward.model.encode(forward.x, pool, forward.plan, forward.kernels, packed)
    plan = forward.plan
    place = (plan.write_pages * PAGE_TOKENS + plan.write_offsets).to(torch.int32)
    for index in range(LAYERS):
        written = pool[plan.write_pages, index, :, plan.write_offsets]
        assert written.isfinite().all()
        encode_rows(expected.shape, written.unbind(1), expected.pages, place, index)
    assert torch.equal(packed.pages, expected.pages)


@pytest.mark.parametrize("format", FORMATS)
def test_packing_changes_neither_rows_nor_states(forward: Forward, format: str) -> None:
    with_packed, without = forward.pool.clone(), forward.pool.clone()
    packed = forward.packed(format)
    got = forward.model.encode(forward.x, with_packed, forward.plan, forward.kernels, packed)
    assert (packed.pages != 255).any()
    assert torch.equal(got, forward.model.encode(forward.x, without, forward.plan, forward.kernels))
    assert torch.equal(with_packed.nan_to_num(7.0), without.nan_to_num(7.0))


@pytest.mark.parametrize("first", [0, 1, 2, LAYERS])
@pytest.mark.parametrize("format", FORMATS)
def test_some_layers_and_then_the_others_are_all_of_them(forward: Forward, format: str, first: int) -> None:
    whole, parts = forward.packed(format), forward.packed(format)
    whole_pool, parts_pool = forward.pool.clone(), forward.pool.clone()
    model, plan, kernels = forward.model, forward.plan, forward.kernels
    expected = model.encode(forward.x, whole_pool, plan, kernels, whole)
    early = model.encode(forward.x, parts_pool, plan, kernels, parts, last=first)
    assert torch.equal(parts_pool[:, first:].nan_to_num(7.0), forward.pool[:, first:].nan_to_num(7.0))
    assert (parts.pages[:, first * parts.shape.layer_bytes :] == 255).all()
    assert torch.equal(model.encode(early, parts_pool, plan, kernels, parts, first=first), expected)
    assert torch.equal(parts_pool.nan_to_num(7.0), whole_pool.nan_to_num(7.0))
    assert torch.equal(parts.pages, whole.pages)


def test_targets_are_the_writes_by_row(forward: Forward) -> None:
    plan = forward.plan
    expected = [-1] * plan.rows
    for row, page, offset in zip(plan.write_rows, plan.write_pages, plan.write_offsets, strict=True):
        expected[row] = int(page) * PAGE_TOKENS + int(offset)
    assert plan.target.tolist() == expected and plan.target.dtype == torch.int32
    assert plan.target is plan.target
