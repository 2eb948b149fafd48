"""Rows of states to packed pages and back, in Triton: a program moves one token's row of each side.

The arithmetic is the reference's to the bit: divisions round to nearest, and no product is fused with a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mtserve.kernels import dependent
from mtserve.kernels.host_format.shape import SMALLEST_PEAK, FormatShape, largest_peak

VALUES_OF_WARP = 512
INFINITY = tl.constexpr(0x7F800000)  # fp32's bits
NAN = tl.constexpr(0x7FC0)  # bf16's bits
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it is rounded to an integer, half to even,
ROUND_BITS = tl.constexpr(0x4B400000)  # and its bits minus these are that integer


@triton.jit
def quantise(x, LEVELS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, PTX: tl.constexpr):
    """Codes int32 [G, N] of x fp32 [G, N], and the groups' peaks as bf16's bits, int32 [G]; PTX: not interpreted."""
    bits = _peak_bits(x, LARGEST, SMALLEST)
    peak = (bits << 16).to(tl.float32, bitcast=True)
    some = peak > 0
    inverse = tl.div_rn(tl.full(peak.shape, LEVELS, tl.float32), tl.where(some, peak, 1.0))
    scaled = tl.where(some[:, None], _product(x, inverse[:, None], PTX), 0.0)
    return (scaled + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS, bits


@triton.jit
def pairs(codes, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Bytes int32 [ROWS, WIDTH // 2] of ROWS * WIDTH codes of 4 bits: the first of two has the lower half."""
    lower, upper = tl.split(tl.reshape(codes, (ROWS, WIDTH // 2, 2)))
    return lower & 15 | upper << 4


@triton.jit
def _peak_bits(x, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """bf16's bits, int32 [G], of the peaks of x fp32 [G, N]: magnitudes are in the order of their bits, NaN last."""
    bits = tl.minimum(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), INFINITY)
    peak = tl.minimum((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, LARGEST)
    peak = tl.where(peak < SMALLEST, 0, peak)
    return tl.where(bits == INFINITY, NAN, peak)


@triton.jit
def _product(a, b, PTX: tl.constexpr):
    """a * b. An instruction that names its rounding is fused with no sum, whatever else the kernel lets be fused."""
    if PTX:
        product = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    else:
        product = a * b
    return product


@triton.jit
def _encode_rows(
    first_ptr, second_ptr, packed_ptr, target_ptr, stride, page_bytes,
    PEAKS: tl.constexpr, SIDES: tl.constexpr, PAGE_TOKENS: tl.constexpr, ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    dependent.start(PDL)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    dependent.wait(PDL)
    if target < 0:
        return
    page_ptr = packed_ptr + (target // PAGE_TOKENS).to(tl.int64) * page_bytes
    g, n = tl.arange(0, G), tl.arange(0, N)
    inside = (g < GROUPS)[:, None] & (n < GROUP)[None, :]
    at = g[:, None] * GROUP + n[None, :]
    for side in tl.static_range(SIDES):
        rows_ptr = first_ptr if side == 0 else second_ptr
        x = tl.load(rows_ptr + row * stride + at, mask=inside, other=0.0)
        place = side * PAGE_TOKENS + target % PAGE_TOKENS
        payload = page_ptr + place * ROW_BYTES
        if BITS > 8:
            tl.store(payload.to(tl.pointer_type(x.dtype)) + at, x, mask=inside)
        else:
            codes, bits = quantise(x.to(tl.float32), LEVELS, LARGEST, SMALLEST, PDL)
            peaks = (page_ptr + PEAKS).to(tl.pointer_type(tl.int16)) + place * GROUPS
            tl.store(peaks + g, bits.to(tl.int16), mask=g < GROUPS)
            if BITS == 8:
                tl.store(payload + at, codes.to(tl.uint8), mask=inside)
            else:
                pair = g[:, None] * (GROUP // 2) + tl.arange(0, N // 2)[None, :]
                tl.store(payload + pair, pairs(codes, G, N).to(tl.uint8), mask=(g < GROUPS)[:, None])


@triton.jit
def _decode_rows(
    packed_ptr, source_ptr, first_ptr, second_ptr, target_ptr, page_bytes, out_page_stride, out_stride,
    PEAKS: tl.constexpr, SIDES: tl.constexpr, PAGE_TOKENS: tl.constexpr, ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    dependent.start(PDL)
    source, target = tl.load(source_ptr + tl.program_id(0)), tl.load(target_ptr + tl.program_id(0))
    dependent.wait(PDL)
    if (source < 0) | (target < 0):
        return
    page_ptr = packed_ptr + (source // PAGE_TOKENS).to(tl.int64) * page_bytes
    out = (target // PAGE_TOKENS).to(tl.int64) * out_page_stride + (target % PAGE_TOKENS) * out_stride
    g, n = tl.arange(0, G), tl.arange(0, N)
    inside = (g < GROUPS)[:, None] & (n < GROUP)[None, :]
    at = g[:, None] * GROUP + n[None, :]
    for side in tl.static_range(SIDES):
        out_ptr = (first_ptr if side == 0 else second_ptr) + out
        element = first_ptr.dtype.element_ty
        place = side * PAGE_TOKENS + source % PAGE_TOKENS
        payload = page_ptr + place * ROW_BYTES
        if BITS > 8:
            x = tl.load(payload.to(tl.pointer_type(element)) + at, mask=inside)
        else:
            if BITS == 8:
                codes = tl.load(payload.to(tl.pointer_type(tl.int8)) + at, mask=inside, other=0)
            else:
                pair = g[:, None] * (GROUP // 2) + tl.arange(0, N // 2)[None, :]
                both = tl.load(payload.to(tl.pointer_type(tl.int8)) + pair, mask=(g < GROUPS)[:, None], other=0)
                both = both.to(tl.int32)
                codes = tl.reshape(tl.join(both << 28 >> 28, both >> 4), (G, N))
            peaks = (page_ptr + PEAKS).to(tl.pointer_type(tl.uint16)) + place * GROUPS
            bits = tl.load(peaks + g, mask=g < GROUPS, other=0).to(tl.int32) << 16
            peak = bits.to(tl.float32, bitcast=True)
            step = tl.div_rn(peak, tl.full(peak.shape, LEVELS, tl.float32))
            x = (codes.to(tl.float32) * step[:, None]).to(element)
        tl.store(out_ptr + at, x, mask=inside)


def encode_rows(
    shape: FormatShape, rows: Sequence[torch.Tensor], packed: torch.Tensor, target: torch.Tensor, layer: int
) -> None:
    """Writes `layer` of the rows that have a target into packed uint8 [pages, shape.bytes], and no other byte.

    `rows`: one tensor [T, *shape.row] a side, (k, v) or (x,), of fp16, bf16 or fp32 ("kv": of shape.dtype), alike in
    their strides; only rows may lie apart. `target` int32 [at least T]: page * page_tokens + offset, -1 for a row
    that is not kept; no two alike but -1. It is read while the kernels before this one still run.
    """
    shape.check_packed(packed, layer)
    first, last = rows[0], rows[-1]
    assert len(rows) == shape.sides and first.shape[1:] == shape.row
    assert last.shape == first.shape and last.stride() == first.stride() and last.dtype == first.dtype
    assert first[:1].is_contiguous() and (first.dtype == shape.dtype or not shape.lossless)
    assert len(target) >= len(first) and target.dtype == torch.int32 and target.is_contiguous()
    if len(first):
        _encode_rows[(len(first),)](
            first, last, packed[:, layer * shape.layer_bytes :], target, first.stride(0), shape.bytes,
            **peak_bounds(first.dtype), **_constants(shape, first),
        )  # fmt: skip


def decode_rows(
    shape: FormatShape, packed: torch.Tensor, source: torch.Tensor, layer: int, out: torch.Tensor, target: torch.Tensor
) -> None:
    """Writes the rows found at `source` in `layer` of packed uint8 [pages, shape.bytes] to `target` in `out`.

    `source` int32 [T]: page * page_tokens + offset. `out`, of fp16, bf16 or fp32 ("kv": of shape.dtype): for x8 and x4
    rows [n, d], of which `target` int32 [T] names one each; for kv and kv8 the layers' pages [pages, layers, 2,
    page_tokens, H, D], in which it is page * page_tokens + offset. Where either is -1 nothing is read or written.
    Rows of `out`, or its pages and layers, may lie apart. Both lists are read while the kernels before this one run.
    """
    shape.check_packed(packed, layer)
    assert out.dtype == shape.dtype or not shape.lossless
    assert source.dtype == target.dtype == torch.int32 and source.shape == target.shape
    assert source.is_contiguous() and target.is_contiguous()
    if shape.sides == 2:
        assert out.shape[1:] == (shape.layers, 2, shape.page_tokens, *shape.row) and out[:1, 0].is_contiguous()
        sides, page_stride, stride = (out[:, layer, 0], out[:, layer, 1]), out.stride(0), out.stride(3)
    else:
        assert out.shape[1:] == shape.row and out.stride(1) == 1
        sides, page_stride, stride = (out, out), out.stride(0) * shape.page_tokens, out.stride(0)
    if len(source):
        _decode_rows[(len(source),)](
            packed[:, layer * shape.layer_bytes :], source, *sides, target, shape.bytes, page_stride, stride,
            **_constants(shape, out),
        )  # fmt: skip


def page_constants(shape: FormatShape) -> dict[str, Any]:
    """What kernels that read or write packed pages are compiled with."""
    return {
        "PEAKS": shape.peaks_offset, "PAGE_TOKENS": shape.page_tokens, "ROW_BYTES": shape.row_bytes,
        "BITS": shape.bits, "LEVELS": 0 if shape.lossless else shape.levels,
        "GROUPS": shape.groups, "GROUP": shape.group,
    }  # fmt: skip


def peak_bounds(dtype: torch.dtype) -> dict[str, Any]:
    """What kernels that quantise values of `dtype` are compiled with: bf16's bits of the peaks' bounds."""
    return {"LARGEST": _bits(largest_peak(dtype)), "SMALLEST": _bits(SMALLEST_PEAK)}


def _bits(value: float) -> int:
    """Of `value` in bf16."""
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16))


def _constants(shape: FormatShape, values: torch.Tensor) -> dict[str, Any]:
    """What both kernels are compiled and launched with."""
    groups, group = triton.next_power_of_2(shape.groups), triton.next_power_of_2(shape.group)
    return {
        **page_constants(shape), "SIDES": shape.sides, "G": groups, "N": group,
        "num_warps": max(1, min(8, groups * group // VALUES_OF_WARP)), **dependent.options(values),
    }  # fmt: skip
