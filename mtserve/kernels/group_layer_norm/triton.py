"""Group layer norm in one pass: a program normalises a few rows, statistics in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mtserve.kernels import dependent
from mtserve.kernels.group_layer_norm.reference import EPSILON
from mtserve.kernels.host_format.packed import PackedRows
from mtserve.kernels.host_format.triton import page_constants, pairs, peak_bounds, quantise

ROWS = 4


@triton.jit
def _group_layer_norm(
    x_ptr, offset_ptr, weight_ptr, bias_ptr, group_ptr, out_ptr, rows, packed_ptr, target_ptr,
    EPS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
    PAGE_BYTES: tl.constexpr = 0, PEAKS: tl.constexpr = 0, PAGE_TOKENS: tl.constexpr = 0, ROW_BYTES: tl.constexpr = 0,
    BITS: tl.constexpr = 0, LEVELS: tl.constexpr = 0, LARGEST: tl.constexpr = 0, SMALLEST: tl.constexpr = 0,
    GROUPS: tl.constexpr = 0, GROUP: tl.constexpr = 0,
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
    if BITS:
        target = tl.load(target_ptr + row, mask=row < rows, other=-1)
    dependent.wait(PDL)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + offset[None, :]
    centred = tl.where(inside, x - (tl.sum(tl.where(inside, x, 0.0), 1) / D)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + EPS)
    out = out_ptr + at
    normalised = (centred * scale[:, None] * weight + bias).to(out_ptr.dtype.element_ty)
    tl.store(out, normalised, mask=inside)
    if BITS:
        _write_packed(
            normalised, packed_ptr, target, PAGE_BYTES, PEAKS, PAGE_TOKENS, ROW_BYTES,
            BITS, LEVELS, LARGEST, SMALLEST, GROUPS, GROUP, ROWS, WIDTH, PDL,
        )  # fmt: skip


@triton.jit
def _write_packed(
    x, packed_ptr, target, PAGE_BYTES: tl.constexpr, PEAKS: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    ROW_BYTES: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """x [ROWS, WIDTH], zeros where they pad a row, into the packed places `target` [ROWS], -1: nowhere."""
    if tl.max(target, 0) < 0:
        return
    G: tl.constexpr = 1 if GROUPS == 1 else WIDTH // GROUP
    groups = tl.reshape(x.to(tl.float32), (ROWS * G, WIDTH // G))
    codes, bits = quantise(groups, LEVELS, LARGEST, SMALLEST, PTX)
    kept = (target >= 0)[:, None]
    page_ptr = packed_ptr + (target // PAGE_TOKENS).to(tl.int64) * PAGE_BYTES
    token = target % PAGE_TOKENS
    # A thread is not to store more values than it has of x: the layout would change, and with it the order of the sums.
    LANES: tl.constexpr = 128 // x.dtype.primitive_bitwidth
    g, at = tl.arange(0, G)[None, :], tl.max_contiguous(tl.arange(0, WIDTH * BITS // 8), LANES)[None, :]
    peaks = (page_ptr + PEAKS).to(tl.pointer_type(tl.int16)) + token * GROUPS
    tl.store(peaks[:, None] + g, tl.reshape(bits, (ROWS, G)).to(tl.int16), mask=kept & (g < GROUPS))
    stored = tl.reshape(codes, (ROWS, WIDTH)) if BITS == 8 else pairs(codes, ROWS, WIDTH)
    tl.store((page_ptr + token * ROW_BYTES)[:, None] + at, stored.to(tl.uint8), mask=kept & (at < ROW_BYTES))


def group_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    group: torch.Tensor,
    offset: torch.Tensor,
    out: torch.Tensor,
    packed: PackedRows | None = None,
) -> None:
    """out [T, d] = GLN(x + offset): x [T, d]; weight, bias [groups, d]; group int32 [T]; offset fp32 [d].

    `offset` is the sum of the output biases of the layers so far: added here, where x is read
    anyway, it saves a pass over x in every layer.

    Rows of `out` with a target go into the `packed` pages too, of format x8 or x4: the bytes that encode_rows of
    `out` writes. Group and targets are read while the kernels before this one still run.
    """
    rows, d = x.shape
    assert x.is_contiguous() and out.is_contiguous() and out.shape == x.shape
    assert weight.shape == bias.shape and weight.shape[1] == d and offset.shape == (d,) and len(group) >= rows
    pages, target, constants = (None, None, {}) if packed is None else _packed_arguments(packed, out)
    _group_layer_norm[(triton.cdiv(rows, ROWS),)](
        x, offset, weight, bias, group, out, rows, pages, target,
        EPS=EPSILON, D=d, WIDTH=triton.next_power_of_2(d), ROWS=ROWS, num_warps=4, **constants,
        **dependent.options(x),
    )  # fmt: skip


def _packed_arguments(packed: PackedRows, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The layer's part of the packed pages, where the rows go, and what the kernel that writes them is compiled with."""
    shape, pages, target, layer = packed
    shape.check_packed(pages, layer)
    assert shape.row == out.shape[1:]
    assert len(target) >= len(out) and target.dtype == torch.int32 and target.is_contiguous()
    constants = {"PAGE_BYTES": shape.bytes, **page_constants(shape), **peak_bounds(out.dtype)}
    return pages[:, layer * shape.layer_bytes :], target, constants
