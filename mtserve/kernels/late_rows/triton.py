"""The rows of a split batch that go on after its first layers: a program copies a few rows, each of its own slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mtserve.kernels import dependent

ROWS = 4


@triton.jit
def _late_rows(
    x_ptr, early_ptr, late_ptr, count_ptr, out_ptr, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, SLOTS)
    # The first of its batch: kernels behind it read the batch's metadata before they wait for it.
    dependent.wait(PDL)
    dependent.start(PDL)
    count = tl.load(count_ptr)
    first = tl.load(late_ptr + 4 * slot + 2, mask=slot < count, other=2147483647)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.sum((first[None, :] <= row[:, None]).to(tl.int32), 1) - 1  # slots without rows come before their equals
    own = tl.maximum(own, 0)
    to, kept = tl.load(late_ptr + 4 * own + 2), tl.load(late_ptr + 4 * own + 3)
    inside = (row < rows) & (count > 0) & (row < to + kept)
    end = tl.load(early_ptr + 4 * own + 2) + tl.load(early_ptr + 4 * own + 3)
    source = (end - kept + row - to).to(tl.int64)
    d = tl.arange(0, WIDTH)
    mask = inside[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + source[:, None] * D + d[None, :], mask=mask)
    tl.store(out_ptr + row[:, None].to(tl.int64) * D + d[None, :], x, mask=mask)


def late_rows(x: torch.Tensor, early: torch.Tensor, late: torch.Tensor, count: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, d]: of each slot the last rows of x [rows, d], as many as it has in `late`; and no other rows of out.

    `early`, `late` int32 [at least B, 4]: cached, delta, first row, rows of each slot, in x and in out; `count` int32
    [1]: B. A slot has as many rows in `early` as in `late` or more; slots lie one behind the other.
    """
    assert x.is_contiguous() and out.is_contiguous() and x.shape[1] == out.shape[1] and x.dtype == out.dtype
    assert early.dtype == late.dtype == count.dtype == torch.int32
    assert early.is_contiguous() and late.is_contiguous() and early.shape[1] == late.shape[1] == 4
    rows, d = out.shape
    slots = triton.next_power_of_2(min(len(early), len(late)))
    _late_rows[(triton.cdiv(rows, ROWS),)](
        x, early, late, count, out, rows,
        D=d, WIDTH=triton.next_power_of_2(d), ROWS=ROWS, SLOTS=slots, num_warps=4, **dependent.options(x),
    )  # fmt: skip
