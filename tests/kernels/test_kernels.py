"""Every fast kernel is held to its reference: tightly in fp32, within the rounding of its type otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_plans import MASKS, SHAPES, Shape, make_batch

from mtserve.errors import InvalidArgument
from mtserve.kernels.backend import OPS, load_kernels

EAGER, REFERENCE = load_kernels("eager"), load_kernels("reference")
# Relative to the largest value: a few roundings of 2^-24 in fp32; of 2^-8 in bf16 and 2^-11 in fp16.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ODD = [Shape(17, 5, 3), Shape(0, 9, 0), Shape(23, 0, 4), Shape(5, 1, 1), Shape(0, 0, 2)]
N = 7


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    assert got.shape == expected.shape
    if expected.numel():
        largest = max(scale, float(expected.abs().max()), 1e-3)
        assert float((got.float().cpu() - expected).abs().max()) <= BOUNDS[dtype] * largest


@given(
    shapes=SHAPES, mask=MASKS, page_tokens=st.integers(1, 64), heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 24, 64]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_attention_equals_the_reference(
    shapes: list[Shape], mask: str, page_tokens: int, heads: int, head_dim: int, seed: int
) -> None:
    batch = make_batch(shapes, mask=mask, page_tokens=page_tokens, heads=heads, head_dim=head_dim, seed=seed)
    expected = REFERENCE.attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N)
    got = EAGER.attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N)
    assert_close(got, expected, torch.float32, scale=1.0)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("head_dim", [8, 32, 96, 128, 256])
@pytest.mark.parametrize("page_tokens", [1, 5, 64])
def test_attention_in_every_type_and_width(page_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    batch = make_batch(ODD, mask="causal", page_tokens=page_tokens, heads=2, head_dim=head_dim, seed=1, dtype=dtype)
    expected = REFERENCE.attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N)
    assert_close(EAGER.attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N), expected, dtype)


@pytest.mark.parametrize("mask", ["causal", "full", "random"])
def test_attention_over_more_rows_than_one_tile(mask: str) -> None:
    batch = make_batch([Shape(70, 290, 300), Shape(3, 2, 1)], mask=mask, page_tokens=16, heads=1, head_dim=8, seed=2)
    expected = REFERENCE.attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N)
    assert_close(EAGER.attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, N), expected, torch.float32)


def test_attention_without_pages() -> None:
    batch = make_batch([Shape(0, 9, 3)], mask="full", page_tokens=4, heads=2, head_dim=8, seed=3)
    expected = REFERENCE.attention(batch.q, batch.k, batch.v, None, batch.plan, N)
    assert_close(EAGER.attention(batch.q, batch.k, batch.v, None, batch.plan, N), expected, torch.float32)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_attention_by_hand(backend: str) -> None:
    """One cached token, one new token, one candidate; one head of width 1: SiLU(q k) v / n, summed by hand."""
    batch = make_batch([Shape(1, 1, 1)], mask="causal", page_tokens=2, heads=1, head_dim=1, seed=0)
    batch.plan.limit[:] = torch.tensor([2, 1])
    page = int(batch.plan.page_table[0, 0])
    batch.pages[page, 0, 0], batch.pages[page, 1, 0] = 0.5, 3.0
    q, k, v = (torch.tensor(values).view(2, 1, 1) for values in ([2.0, -1.0], [1.0, 4.0], [10.0, 100.0]))
    # The new row: SiLU(1) * 3 + SiLU(2) * 10. The candidate: SiLU(-0.5) * 3 + SiLU(-4) * 100.
    expected = torch.tensor([0.731058579 * 3 + 1.761594156 * 10, -0.188770334 * 3 - 0.071944840 * 100]) / N
    got = load_kernels(backend).attention(q, k, v, batch.pages, batch.plan, N)
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-6, atol=1e-6)


@given(
    rows=st.integers(0, 20), width=st.integers(2, 70), groups=st.sampled_from([1, 4]), gate_first=st.booleans(),
    dtype=st.sampled_from(list(BOUNDS)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_norms_and_projection_equal_their_references(
    rows: int, width: int, groups: int, gate_first: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, u, weight, bias = random(rows, width), random(rows, width), random(groups, width), random(groups, width)
    group = torch.randint(0, groups, (rows,), generator=generator)
    arguments: Any = (x, weight, bias, group)
    assert_close(EAGER.group_layer_norm(*arguments), REFERENCE.group_layer_norm(*arguments), dtype, 4.0)
    arguments = (x, u, weight, bias, group, gate_first)
    # Normalising a product that was rounded first magnifies its rounding.
    assert_close(EAGER.norm_gate(*arguments), REFERENCE.norm_gate(*arguments), dtype, 16.0)
    arguments = (x, random(width, 3 * width) / width**0.5, random(3 * width))
    assert_close(EAGER.projection_silu(*arguments), REFERENCE.projection_silu(*arguments), dtype, 4.0)


def test_group_layer_norm_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    weight, bias = torch.tensor([[1.0, 1.0], [2.0, 5.0]]), torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    for kernels in (EAGER, REFERENCE):
        got = kernels.group_layer_norm(x, weight, bias, torch.tensor([0, 1]))
        torch.testing.assert_close(got, torch.tensor([[-1.0, 1.0], [-1.0, 4.0]]), rtol=0, atol=1e-5)


def test_the_two_orders_of_norm_and_gate_differ() -> None:
    y, u = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]])
    one, zero, group = torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    for kernels in (EAGER, REFERENCE):
        after = kernels.norm_gate(y, u, one, zero, group, False)
        before = kernels.norm_gate(y, u, one, zero, group, True)
        torch.testing.assert_close(after, torch.tensor([[-2.0, 4.0]]), rtol=0, atol=1e-5)
        torch.testing.assert_close(before, torch.tensor([[-1.0, 1.0]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@given(shapes=SHAPES, page_tokens=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_page_write_touches_its_rows_alone(backend: str, shapes: list[Shape], page_tokens: int, seed: int) -> None:
    batch = make_batch(shapes, mask="causal", page_tokens=page_tokens, heads=2, head_dim=8, seed=seed)
    pages = torch.randn(batch.pages.shape, generator=torch.Generator().manual_seed(seed))
    expected = pages.clone()
    plan = batch.plan
    for row, page, offset in zip(plan.write_rows, plan.write_pages, plan.write_offsets, strict=True):
        expected[page, 0, offset], expected[page, 1, offset] = batch.k[row], batch.v[row]
    load_kernels(backend).page_write(batch.k, batch.v, pages, plan)
    assert torch.equal(pages, expected)


def test_page_write_into_one_layer_of_a_pool_leaves_the_others() -> None:
    batch = make_batch(ODD, mask="causal", page_tokens=4, heads=2, head_dim=8, seed=4)
    pool = torch.zeros(len(batch.pages), 3, *batch.pages.shape[1:])
    EAGER.page_write(batch.k, batch.v, pool[:, 1], batch.plan)
    assert pool[:, 1].abs().sum() > 0
    assert pool[:, 0].abs().sum() == pool[:, 2].abs().sum() == 0


def test_backends_are_explicit() -> None:
    with pytest.raises(InvalidArgument, match="eager, reference") as caught:
        load_kernels("fastest")
    assert caught.value.field == "kernels"
    for kernels in (EAGER, REFERENCE):
        assert all(callable(getattr(kernels, op)) for op in OPS)
