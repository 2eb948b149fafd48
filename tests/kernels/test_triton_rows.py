"""The row kernels in Triton against their references: fp32, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from mtserve.kernels.group_layer_norm.reference import group_layer_norm as norm_truth
from mtserve.kernels.group_layer_norm.triton import group_layer_norm
from mtserve.kernels.norm_gate.reference import norm_gate as gate_truth
from mtserve.kernels.norm_gate.triton import norm_gate
from mtserve.kernels.projection_silu.reference import projection_silu as projection_truth
from mtserve.kernels.projection_silu.triton import fusable, project, silu_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
SIZES = [(1, 32), (13, 48), (66, 96)]


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def _groups(rows: int) -> torch.Tensor:
    return torch.randint(0, 4, (rows,), dtype=torch.int32, device=DEVICE)


def _close(got: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu(), truth.cpu(), rtol=2e-5, atol=2e-5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_group_layer_norm_adds_its_offset_first(rows: int, d: int) -> None:
    x, weight, bias, offset, group = _rand(rows, d), _rand(4, d), _rand(4, d), _rand(d), _groups(rows)
    out = torch.full_like(x, NAN)
    group_layer_norm(x, weight, bias, group, offset, out)
    _close(out, norm_truth(x + offset, weight, bias, group.long()))


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_norm_gate_sums_each_rows_own_splits(rows: int, width: int, gate_first: bool) -> None:
    splits = torch.randint(1, 5, (rows,), dtype=torch.int32, device=DEVICE)
    partial = torch.full((4, rows, width), NAN, device=DEVICE)  # what no split wrote is never read
    for row in range(rows):
        partial[: splits[row], row] = _rand(int(splits[row]), width)
    y = torch.nan_to_num(partial).sum(0)
    u, weight, bias, group = _rand(rows, 4 * width)[:, :width], _rand(4, width), _rand(4, width), _groups(rows)
    truth = gate_truth(y, u, weight, bias, group.long(), gate_first)
    for attended in (partial, y):
        out = torch.full((rows, width), NAN, device=DEVICE)
        norm_gate(attended, u, weight, bias, group, gate_first, splits, out)
        _close(out, truth)


def test_norm_gate_takes_rows_of_no_split_for_zero() -> None:
    splits = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    partial = torch.full((2, 2, 32), NAN, device=DEVICE)
    partial[:, 1] = 1.0
    u, weight, bias, out = _rand(2, 32), _rand(4, 32), _rand(4, 32), torch.full((2, 32), NAN, device=DEVICE)
    norm_gate(partial, u, weight, bias, _groups(2), False, splits, out)
    assert torch.isfinite(out).all()


def _paged(mixed: torch.Tensor, heads: int, pool: torch.Tensor, target: torch.Tensor, layer: int) -> torch.Tensor:
    """`pool` as it should be once the rows with a target have been written."""
    expected = pool.clone()
    states = mixed.view(len(mixed), 4, heads, -1)
    for row, where in enumerate(target.tolist()):
        if where >= 0:
            page, offset = divmod(where, pool.shape[3])
            expected[page, layer, 0, offset] = states[row, 3]
            expected[page, layer, 1, offset] = states[row, 1]
    return expected


def _case(rows: int, heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    pool = torch.full((6, 3, 2, 4, heads, head_dim), NAN, device=DEVICE)
    target = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    kept = torch.randperm(rows)[: min(rows, 9)]
    target[kept] = torch.randperm(24)[: len(kept)].to(torch.int32).to(DEVICE)
    return pool, target


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 1, 8), (19, 3, 16), (33, 2, 80)])
def test_silu_pages_writes_the_kept_rows_and_no_others(rows: int, heads: int, head_dim: int, paged: bool) -> None:
    width = heads * head_dim
    x, bias = _rand(rows, 4 * width), _rand(4 * width)
    pool, target = _case(rows, heads, head_dim)
    mixed = x.clone()
    silu_pages(mixed, bias, target, pool if paged else None, 1, approximate=False)
    _close(mixed, torch.nn.functional.silu(x + bias))
    before = torch.full_like(pool, NAN)
    expected = _paged(mixed, heads, before, target, 1) if paged else before
    torch.testing.assert_close(pool, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("rows", [1, 65, 530])
def test_project_is_projection_silu_and_page_write(rows: int, paged: bool) -> None:
    heads, head_dim, d = 2, 64, 96
    width = heads * head_dim
    assert fusable(rows, width)
    x, weight, bias = _rand(rows, d), _rand(d, 4 * width) * d**-0.5, _rand(4 * width)
    pool, target = _case(rows, heads, head_dim)
    mixed = torch.full((rows, 4 * width), NAN, device=DEVICE)
    project(x, weight, bias, target, mixed, pool if paged else None, 2, approximate=False)
    if DEVICE == "cpu":  # on a GPU Triton multiplies fp32 as TF32
        _close(mixed, projection_truth(x, weight, bias))
    else:
        torch.testing.assert_close(mixed.cpu(), projection_truth(x, weight, bias), rtol=2e-2, atol=2e-2)
    before = torch.full_like(pool, NAN)
    expected = _paged(mixed, heads, before, target, 2) if paged else before
    torch.testing.assert_close(pool, expected, equal_nan=True, rtol=0, atol=0)


def test_project_leaves_other_shapes_to_the_library() -> None:
    assert not fusable(100_000, 512)
    assert not fusable(600, 96)
    assert not fusable(64, 32)
