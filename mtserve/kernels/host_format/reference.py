"""Rows of states to packed pages and back, the truth: fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtserve.kernels.host_format.shape import SMALLEST_PEAK, FormatShape, largest_peak


def encode_rows(
    shape: FormatShape, rows: Sequence[torch.Tensor], packed: torch.Tensor, target: torch.Tensor, layer: int
) -> None:
    """Writes `layer` of the rows that have a target into packed uint8 [pages, shape.bytes], and no other byte.

    `rows`: one tensor [T, *shape.row] a side, (k, v) or (x,), of fp16, bf16 or fp32 ("kv": of shape.dtype).
    `target` int32 [T]: page * page_tokens + offset, -1 for a row that is not kept; no two alike but -1.
    """
    shape.check_packed(packed, layer)
    kept = torch.nonzero(target >= 0)[:, 0]
    page, offset = target[kept] // shape.page_tokens, target[kept] % shape.page_tokens
    payload = shape.payload(packed, layer)
    for side, values in enumerate(rows):
        groups = values[kept].reshape(-1, shape.groups, shape.group)
        if shape.lossless:
            stored = groups.flatten(1).view(torch.uint8)
        else:
            codes, peaks = quantise(groups, shape.levels)
            stored = _pack(codes.flatten(1), shape.bits)
            shape.peaks(packed, layer)[page, side, offset] = peaks
        payload[page, side, offset] = stored


def decode_rows(
    shape: FormatShape, packed: torch.Tensor, source: torch.Tensor, layer: int, out: torch.Tensor, target: torch.Tensor
) -> None:
    """Writes the rows found at `source` in `layer` of packed uint8 [pages, shape.bytes] to `target` in `out`.

    `source` int32 [T]: page * page_tokens + offset. `out`, of fp16, bf16 or fp32 ("kv": of shape.dtype): for x8 and x4
    rows [n, d], of which `target` int32 [T] names one each; for kv and kv8 the layers' pages [pages, layers, 2,
    page_tokens, H, D], in which it is page * page_tokens + offset. Where either is -1 nothing is read or written.
    """
    shape.check_packed(packed, layer)
    kept = torch.nonzero((source >= 0) & (target >= 0))[:, 0]
    page, offset = source[kept] // shape.page_tokens, source[kept] % shape.page_tokens
    at = target[kept]
    for side in range(shape.sides):
        stored = shape.payload(packed, layer)[page, side, offset]
        if shape.lossless:
            values = stored.view(shape.dtype)
        else:
            codes = _unpack(stored, shape.bits).unflatten(1, (shape.groups, shape.group))
            values = dequantise(codes, shape.peaks(packed, layer)[page, side, offset], shape.levels).to(out.dtype)
        values = values.reshape(-1, *shape.row)
        if shape.sides == 2:
            out[at // shape.page_tokens, layer, side, at % shape.page_tokens] = values
        else:
            out[at] = values


def quantise(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 of `values` [..., group] and the groups' peaks bf16 [...], NaN where a value is not finite."""
    largest = values.float().abs().amax(-1)
    peaks = largest.clamp(max=largest_peak(values.dtype)).bfloat16()
    peaks[peaks < SMALLEST_PEAK] = 0.0
    peaks[~largest.isfinite()] = float("nan")
    # A number divided by a tensor would be rounded twice: torch multiplies it by the reciprocal.
    inverse = torch.full_like(largest, levels) / peaks.float()
    codes = (values.float() * inverse.unsqueeze(-1)).round()
    codes[~(peaks > 0)] = 0.0
    return codes.to(torch.int8), peaks


def dequantise(codes: torch.Tensor, peaks: torch.Tensor, levels: int) -> torch.Tensor:
    """Values fp32 [..., group] of codes int8 [..., group] and peaks [...]."""
    return codes.float() * (peaks.float() / levels).unsqueeze(-1)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [n, bytes] of codes [n, width]: of two codes of 4 bits the first has the lower half."""
    if bits == 8:
        return codes.view(torch.uint8)
    first, second = codes[:, 0::2], codes[:, 1::2]
    return (first & 15 | second << 4).view(torch.uint8)


def _unpack(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, width] of bytes [n, bytes]."""
    codes = stored.view(torch.int8)
    if bits == 8:
        return codes
    return torch.stack((codes << 4 >> 4, codes >> 4), dim=-1).flatten(1)
