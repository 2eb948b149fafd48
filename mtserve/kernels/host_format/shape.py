"""The formats in which the host may keep a page of states, and where everything lies in it.

    format  a token's rows of one layer    values            values of a peak   bytes a token and layer
    kv      K [H, D] and V [H, D]          as computed       -                  2 * H * D * itemsize
    kv8     K [H, D] and V [H, D]          int8              D                  2 * H * D + 2 * H * 2
    x8      normalised layer input [d]     int8              d                  d + 2
    x4      normalised layer input [d]     int4, two a byte  32                 d / 2 + d / 32 * 2

A value is stored as code = round(value / peak * levels), half to even, of -levels to levels (127 or 7), and comes back
as code * peak / levels. `peak` is the largest magnitude of its group, in bf16: to nearest, but never past the largest
bf16 number that the values' own type can hold. The largest value's code is levels or -levels even so (bf16 is off by
less than half a code), so that it comes back as the very peak, and every other value moves by less than half a code
when fp16 or bf16 rounds it: encoding what was decoded, in the type it was encoded from, gives the same bytes again.

Peaks below SMALLEST_PEAK count as 0: their groups come back as exact zeros, and nothing depends on how a device
treats subnormal numbers. A group with an infinity or a NaN has the peak NaN and comes back as NaN throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtserve.errors import InvalidArgument

FORMATS = ("kv", "kv8", "x8", "x4")
ALIGNMENT = 16
SMALLEST_PEAK = 2.0**-110
_BITS = {"kv8": 8, "x8": 8, "x4": 4}
_INT4_GROUP = 32
_PEAK_BYTES = 2
_LARGEST_PEAKS = {
    torch.float16: 65280.0,
    torch.bfloat16: torch.finfo(torch.bfloat16).max,
    torch.float32: torch.finfo(torch.bfloat16).max,
}


def largest_peak(dtype: torch.dtype) -> float:
    """The largest bf16 number that `dtype` (fp16, bf16 or fp32) can hold."""
    return _LARGEST_PEAKS[dtype]


@dataclass(frozen=True)
class FormatShape:
    """Geometry of one page in `format`: [layers] of payload, then peaks, each rounded up to ALIGNMENT bytes.

    A layer's payload is [sides, page_tokens, row_bytes], its peaks bf16 [sides, page_tokens, groups]; the sides are
    K and V, or X alone. So every group of layers is contiguous and aligned, and a page has

        layer_bytes = up(sides * page_tokens * row_bytes) + up(sides * page_tokens * groups * 2)
        bytes       = layers * layer_bytes

    "kv" has no peaks: its pages are those of the device's pool, of `dtype`, byte for byte (where D is at least 8).
    Raises InvalidArgument for an unknown format, sizes below 1, and an x4 whose d is no multiple of 32.
    """

    format: str
    layers: int
    page_tokens: int
    heads: int
    head_dim: int
    d: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InvalidArgument(f"{self.format!r} is not one of {', '.join(FORMATS)}", field="format")
        if self.dtype not in _LARGEST_PEAKS:
            raise InvalidArgument(f"{self.dtype} is not fp16, bf16 or fp32", field="dtype")
        for name in ("layers", "page_tokens", "heads", "head_dim", "d"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{getattr(self, name)} is below 1", field=name)
        if self.format == "x4" and self.d % _INT4_GROUP:
            raise InvalidArgument(f"{self.d} is no multiple of {_INT4_GROUP}, as x4 needs", field="d")

    @property
    def lossless(self) -> bool:
        return self.format == "kv"

    @property
    def sides(self) -> int:
        """Rows that a token has in a layer: K and V, or X."""
        return 2 if self.format in ("kv", "kv8") else 1

    @property
    def row(self) -> tuple[int, ...]:
        """Sizes of one side's row of values: [H, D] or [d]."""
        return (self.heads, self.head_dim) if self.sides == 2 else (self.d,)

    @property
    def groups(self) -> int:
        """Groups of values in a row; all but "kv" keep a peak for each."""
        return {"kv": self.heads, "kv8": self.heads, "x8": 1, "x4": self.d // _INT4_GROUP}[self.format]

    @property
    def group(self) -> int:
        """Values of a group."""
        return {"kv": self.head_dim, "kv8": self.head_dim, "x8": self.d, "x4": _INT4_GROUP}[self.format]

    @property
    def bits(self) -> int:
        """Of a stored value."""
        return _BITS.get(self.format, 8 * self.dtype.itemsize)

    @property
    def levels(self) -> int:
        """The largest code; of a format that has codes."""
        return (1 << _BITS[self.format] - 1) - 1

    @property
    def row_bytes(self) -> int:
        return self.groups * self.group * self.bits // 8

    @property
    def peaks_offset(self) -> int:
        """Of a layer's peaks from the layer's first byte."""
        return _up(self.sides * self.page_tokens * self.row_bytes)

    @property
    def layer_bytes(self) -> int:
        """From one layer to the next."""
        return self.peaks_offset + _up(0 if self.lossless else self._peaks * _PEAK_BYTES)

    @property
    def bytes(self) -> int:
        return self.layers * self.layer_bytes

    @property
    def _peaks(self) -> int:
        return self.sides * self.page_tokens * self.groups

    def payload(self, packed: torch.Tensor, layer: int) -> torch.Tensor:
        """uint8 view [pages, sides, page_tokens, row_bytes] of `layer` in packed uint8 [pages, bytes]."""
        first, size = layer * self.layer_bytes, self.sides * self.page_tokens * self.row_bytes
        return packed[:, first : first + size].unflatten(1, (self.sides, self.page_tokens, self.row_bytes))

    def peaks(self, packed: torch.Tensor, layer: int) -> torch.Tensor:
        """bf16 view [pages, sides, page_tokens, groups] of `layer` in packed uint8 [pages, bytes]; not of "kv"."""
        assert not self.lossless
        first = layer * self.layer_bytes + self.peaks_offset
        peaks = packed[:, first : first + self._peaks * _PEAK_BYTES].view(torch.bfloat16)
        return peaks.unflatten(1, (self.sides, self.page_tokens, self.groups))

    def places(self, pages: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """int32 [last - first]: where tokens [first, last) of a history lie whose pages are `pages`, ids in order."""
        token = torch.arange(first, last, device=pages.device)
        return (pages[token // self.page_tokens] * self.page_tokens + token % self.page_tokens).to(torch.int32)

    def check_packed(self, packed: torch.Tensor, layer: int) -> None:
        """Asserts that `packed` is uint8 [pages, bytes], contiguous and aligned, and that it has `layer`."""
        assert packed.dtype == torch.uint8 and packed.dim() == 2 and packed.shape[1] == self.bytes
        assert packed.is_contiguous() and packed.data_ptr() % ALIGNMENT == 0
        assert 0 <= layer < self.layers


def _up(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
