"""The row kernels in Triton against their references: fp32, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from mtserve.kernels.attention.work import FIRST_HALF_SHIFT, sum_partial
from mtserve.kernels.group_layer_norm.reference import group_layer_norm as norm_truth
from mtserve.kernels.group_layer_norm.triton import group_layer_norm
from mtserve.kernels.norm_gate.reference import norm_gate as gate_truth
from mtserve.kernels.norm_gate.triton import norm_gate

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


def test_norm_gate_adds_the_halves_of_a_deterministic_plan_as_it_says() -> None:
    rows, width = 37, 48
    count = torch.randint(1, 6, (rows,), dtype=torch.int32, device=DEVICE)
    first = torch.minimum(torch.randint(1, 4, (rows,), dtype=torch.int32, device=DEVICE), count)
    splits = count | first << FIRST_HALF_SHIFT
    partial = torch.full((6, rows, width), NAN, device=DEVICE)
    for row in range(rows):
        partial[: count[row], row] = _rand(int(count[row]), width)
    u, weight, bias, group = _rand(rows, width), _rand(4, width), _rand(4, width), _groups(rows)
    out, alone = torch.full((rows, width), NAN, device=DEVICE), torch.full((rows, width), NAN, device=DEVICE)
    norm_gate(partial, u, weight, bias, group, False, splits, out, halves=True)
    _close(out, gate_truth(sum_partial(partial, splits, halves=True), u, weight, bias, group.long(), False))
    # Whoever has added a half's sums in that order already gives the same bits.
    halves = torch.full((6, rows, width), NAN, device=DEVICE)
    for row in range(rows):
        halves[0, row] = sum_in_order(partial[: first[row], row])
        halves[1, row] = sum_in_order(partial[first[row] : count[row], row])
    norm_gate(
        halves, u, weight, bias, group, False, torch.full_like(splits, 2 | 1 << FIRST_HALF_SHIFT), alone, halves=True
    )
    assert torch.equal(out, alone)


def sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(parts.shape[1:], device=parts.device) if len(parts) == 0 else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def test_norm_gate_takes_rows_of_no_split_for_zero() -> None:
    splits = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    partial = torch.full((2, 2, 32), NAN, device=DEVICE)
    partial[:, 1] = 1.0
    u, weight, bias, out = _rand(2, 32), _rand(4, 32), _rand(4, 32), torch.full((2, 32), NAN, device=DEVICE)
    norm_gate(partial, u, weight, bias, _groups(2), False, splits, out)
    assert torch.isfinite(out).all()
