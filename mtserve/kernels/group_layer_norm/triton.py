"""Group layer norm in one pass: a program normalises a few rows, statistics in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mtserve.kernels import dependent
from mtserve.kernels.group_layer_norm.reference import EPSILON

ROWS = 4


@triton.jit
def _group_layer_norm(
    x_ptr, offset_ptr, weight_ptr, bias_ptr, group_ptr, out_ptr, rows,
    EPS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    dependent.start(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None].to(tl.int64) * D + d[None, :]
    group = tl.load(group_ptr + row, mask=row < rows, other=0)
    affine = group[:, None] * D + d[None, :]
    weight = tl.load(weight_ptr + affine, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + affine, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + d, mask=d < D, other=0.0)
    dependent.wait(PDL)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + offset[None, :]
    centred = tl.where(inside, x - (tl.sum(tl.where(inside, x, 0.0), 1) / D)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + EPS)
    tl.store(out_ptr + at, (centred * scale[:, None] * weight + bias).to(out_ptr.dtype.element_ty), mask=inside)


def group_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    group: torch.Tensor,
    offset: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out [T, d] = GLN(x + offset): x [T, d]; weight, bias [groups, d]; group int32 [T]; offset fp32 [d].

    `offset` is the sum of the output biases of the layers so far: added here, where x is read
    anyway, it saves a pass over x in every layer.
    """
    rows, d = x.shape
    assert x.is_contiguous() and out.is_contiguous() and out.shape == x.shape
    assert weight.shape == bias.shape and weight.shape[1] == d and offset.shape == (d,) and len(group) >= rows
    _group_layer_norm[(triton.cdiv(rows, ROWS),)](
        x, offset, weight, bias, group, out, rows,
        EPS=EPSILON, D=d, WIDTH=triton.next_power_of_2(d), ROWS=ROWS, num_warps=4,
        **dependent.options(x),
    )  # fmt: skip
