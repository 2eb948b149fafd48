"""Pages of fp8: values are rounded once, where they are made; writing pages and reading them changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_plans import Shape, make_batch
from small_models import small_model

from mtserve.kernels.backend import load_kernels
from mtserve.kernels.page_write.rounding import FP8, LARGEST_FP8, movable, rounded
from mtserve.model.state_bound import state_bound

BACKENDS = ["eager", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD = [Shape(17, 5, 3), Shape(0, 9, 0), Shape(23, 0, 4), Shape(5, 1, 1)]


def every_number() -> torch.Tensor:
    """float32: what the 254 bytes that are no NaN mean, worked out from the format's definition."""
    numbers = []
    for byte in range(256):
        exponent, fraction = byte >> 3 & 15, byte & 7
        size = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6
        if byte & 0x7F != 0x7F:
            numbers.append(-size if byte >> 7 else size)
    return torch.tensor(numbers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_finds_the_nearest_number_of_the_format(dtype: torch.dtype) -> None:
    grid = every_number()
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 4000)
    values = values.clamp(-LARGEST_FP8, LARGEST_FP8).to(dtype)
    got = rounded(values, FP8)
    assert got.dtype == dtype and torch.isin(got.float(), grid).all()
    nearest = (values.float()[:, None] - grid).abs().amin(1)
    assert torch.equal((got.float() - values.float()).abs(), nearest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_rounded_stays_as_it_is(dtype: torch.dtype) -> None:
    numbers = every_number().to(dtype)
    assert torch.equal(rounded(numbers, FP8), numbers)
    assert torch.equal(numbers.to(FP8).to(dtype), numbers)
    ends = torch.tensor([1e4, -1e4, float("inf"), LARGEST_FP8]).to(dtype)
    assert rounded(ends, FP8).tolist() == [448.0, -448.0, 448.0, 448.0]
    assert rounded(torch.tensor([float("nan")], dtype=dtype), FP8).isnan().all()
    assert rounded(numbers, dtype) is numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_keep_what_was_rounded_for_them(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(ODD, mask="causal", page_tokens=4, heads=2, head_dim=8, seed=1, dtype=dtype)
    k, v = (rounded(rows * 20, FP8) for rows in (batch.k, batch.v))
    pages, plan = torch.full(batch.pages.shape, float("nan")).to(FP8), batch.plan
    load_kernels(backend).page_write(k, v, pages, plan)
    written = movable(pages)[plan.write_pages, :, plan.write_offsets].view(FP8).to(dtype)
    assert torch.equal(written, torch.stack((k, v), 1)[plan.write_rows])
    assert int(pages.float().isfinite().sum()) == 2 * 2 * 8 * len(plan.write_rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_over_fp8_pages_is_that_over_the_same_numbers(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(ODD, mask="causal", page_tokens=4, heads=2, head_dim=8, seed=2, dtype=dtype)
    pages = rounded(batch.pages, FP8)
    attention = load_kernels(backend).attention
    expected = attention(batch.q, batch.k, batch.v, pages, batch.plan, 7)
    got = attention(batch.q, batch.k, batch.v, pages.to(FP8), batch.plan, 7)
    assert torch.isfinite(got).all() and torch.equal(got, expected)


def test_a_layer_lets_nobody_see_more_than_its_pages_hold() -> None:
    """The batch's own rows attend to rounded K and V: those that its pages then keep, bit for bit."""
    model = small_model(layers=1, d=32, heads=2, head_dim=8)
    kernels, seen = load_kernels("eager"), []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.extend((k, v))
        return kernels.attention(q, k, v, *rest)

    batch = make_batch([Shape(0, 9, 3)], mask="causal", page_tokens=4, heads=2, head_dim=8, seed=3)
    pool = batch.pages.unsqueeze(1).to(FP8)
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model.encode(x, pool, batch.plan, replace(kernels, attention=attention))
    k, v = seen
    assert torch.equal(rounded(k, FP8), k) and torch.equal(rounded(v, FP8), v)
    plan = batch.plan
    kept = movable(pool)[plan.write_pages, 0, :, plan.write_offsets].view(FP8).float()
    assert torch.equal(kept, torch.stack((k, v), 1)[plan.write_rows])


@pytest.mark.parametrize("norm", ["group", "plain"])
def test_no_row_passes_the_bound_and_a_worst_one_comes_near(norm: str) -> None:
    model = small_model(layers=2, d=32, heads=2, head_dim=8, norm=norm)
    generator, kernels = torch.Generator().manual_seed(5), load_kernels("eager")
    largest, near = 0.0, 0.0
    with torch.inference_mode():
        for layer in model.layers:
            for each in (layer.norm_weight, layer.norm_bias, layer.uvqk_bias):
                each += 0.3 * torch.randn(each.shape, generator=generator)
            for row in range(len(layer.norm_weight)):
                # Rows along a column of the product are the largest that the norm lets through.
                columns = layer.uvqk_weight.T * layer.norm_weight[row]
                x = torch.cat((columns, -columns, torch.randn(200, 32, generator=generator)))
                group = torch.full((len(x),), row)
                xn = kernels.group_layer_norm(x, layer.norm_weight, layer.norm_bias, group)
                states = kernels.projection_silu(xn, layer.uvqk_weight, layer.uvqk_bias).view(-1, 4, 16)[:, 1::2]
                largest = max(largest, float(states.abs().max()))
        bound = state_bound(model)
        near = largest / bound
        for layer in model.layers:
            layer.uvqk_weight *= 3
            layer.uvqk_bias *= 3
    assert 0.8 < near <= 1
    assert state_bound(model) == pytest.approx(3 * bound)
