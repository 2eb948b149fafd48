"""Norm and gate in one pass, summing the attention's partial sums on the way in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mtserve.kernels import dependent
from mtserve.kernels.attention.work import FIRST_HALF_SHIFT
from mtserve.kernels.group_layer_norm.reference import EPSILON

ROWS = 4


@triton.jit
def _norm_gate(
    y_ptr, u_ptr, weight_ptr, bias_ptr, group_ptr, splits_ptr, out_ptr, rows, u_stride, split_stride,
    GATE_FIRST: tl.constexpr, PARTIAL: tl.constexpr, SHIFT: tl.constexpr, EPS: tl.constexpr,
    W: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    dependent.start(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (w < W)[None, :]
    at = row[:, None].to(tl.int64) * W + w[None, :]
    group = tl.load(group_ptr + row, mask=row < rows, other=0)
    affine = group[:, None] * W + w[None, :]
    weight = tl.load(weight_ptr + affine, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + affine, mask=inside, other=0.0).to(tl.float32)
    splits = tl.load(splits_ptr + row, mask=row < rows, other=0)
    dependent.wait(PDL)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if PARTIAL:
        if SHIFT:
            first = splits >> SHIFT
            splits &= (1 << SHIFT) - 1
        # What no work item wrote holds anything: a row's sums end where its splits do.
        y = tl.where((splits > 0)[:, None], y, 0.0)
        second = tl.zeros_like(y)
        for split in range(1, tl.max(splits, 0)):
            more = inside & (split < splits)[:, None]
            part = tl.load(y_ptr + split * split_stride + at, mask=more, other=0.0).to(tl.float32)
            if SHIFT:
                y += tl.where((split < first)[:, None], part, 0.0)
                second += tl.where((split < first)[:, None], 0.0, part)
            else:
                y += part
        if SHIFT:
            y += second
    u = tl.load(u_ptr + row[:, None].to(tl.int64) * u_stride + w[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATE_FIRST:
        y = y * u
    centred = tl.where(inside, y - (tl.sum(y, 1) / W)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / W + EPS)
    gated = centred * scale[:, None] * weight + bias
    if not GATE_FIRST:
        gated = gated * u
    tl.store(out_ptr + at, gated.to(out_ptr.dtype.element_ty), mask=inside)


def norm_gate(
    y: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    group: torch.Tensor,
    gate_first: bool,
    splits: torch.Tensor,
    out: torch.Tensor,
    *,
    halves: bool = False,
) -> None:
    """out [T, w] = GLN(sum of y) * u, or GLN(sum of y * u) with `gate_first`.

    y: [T, w], or partial sums fp32 [S, T_cap, w] of which row t has the first splits[t]; u [T, w] rows of
    any stride; weight, bias [groups, w]; group, splits int32 [T]. `halves`: splits are those of a deterministic plan,
    whose order of addition is kept (`AttentionWork`).
    """
    rows, width = out.shape
    partial = y.dim() == 3
    assert y.shape[-1] == width and u.shape == (rows, width) and u.stride(1) == 1
    assert y.is_contiguous() and out.is_contiguous() and len(group) >= rows and len(splits) >= rows
    _norm_gate[(triton.cdiv(rows, ROWS),)](
        y, u, weight, bias, group, splits, out, rows, u.stride(0), y.stride(0) if partial else 0,
        GATE_FIRST=gate_first, PARTIAL=partial, SHIFT=FIRST_HALF_SHIFT if halves else 0, EPS=EPSILON,
        W=width, WIDTH=triton.next_power_of_2(width), ROWS=ROWS, num_warps=4,
        **dependent.options(out),
    )  # fmt: skip
