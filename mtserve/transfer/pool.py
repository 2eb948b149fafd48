"""The shape of a page, and the device's pool of them.

What crosses the link has one shape on the device and in host memory: the states themselves (`PageShape`), or packed
twins of them (`PackedPageShape`), of which the device has one beside the states of each page.

Sizes were chosen by trials on an H200, with the link's 55 GB/s as the goal; benchmarks/bench_transfer.py repeats those
of whole pages:

    page    64 tokens of all layers side by side: 1 MiB for 8 layers x 4 heads x 128 in bf16. The copy engine moves
            whole pages that lie anywhere at 54 GB/s; by layer, 128 KiB, it would be 40.
    run     up to 16 neighbouring pages of one user, on both sides (csrc/cache/allocator.h): 2 layers of such a run,
            a strided piece of 4 MiB, move at 53 GB/s, so that a long history can come by groups of layers.
    chunk   64 MiB of the arena, pinned at once (transfer/arena.py): other calls of CUDA wait 2.5 ms for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mtserve.errors import ResourceExhausted
from mtserve.kernels.page_write.rounding import FP8, FP8_NAN, movable
from mtserve.units import format_bytes


class Geometry(Protocol):
    """Of one page: `sizes` of a tensor of `dtype`, `bytes` in all; `sizes[0]` are the layers, which lie one by one."""

    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class PageShape:
    """Geometry of one page: [layers, 2 (K, V), page_tokens, heads, head_dim] of `dtype`."""

    layers: int
    page_tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.page_tokens, self.heads, self.head_dim)

    @property
    def bytes(self) -> int:
        layers, sides, tokens, heads, head_dim = self.sizes
        return layers * sides * tokens * heads * head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class PackedPageShape:
    """Geometry of one packed page: uint8 [layers, layer_bytes]."""

    layers: int
    layer_bytes: int
    dtype: torch.dtype = torch.uint8

    @property
    def sizes(self) -> tuple[int, int]:
        return (self.layers, self.layer_bytes)

    @property
    def bytes(self) -> int:
        return self.layers * self.layer_bytes


def poison_of(dtype: torch.dtype) -> float:
    """What `movable` pages of `dtype` are poisoned with: NaN; in packed pages bytes that make NaN of every peak."""
    if dtype == FP8:
        return FP8_NAN
    return float("nan") if dtype.is_floating_point else 255


def poison(pages: torch.Tensor, ids: torch.Tensor) -> None:
    """Fill those of `pages` [pages, ...] that `ids` int64 [n] names with what makes NaN."""
    movable(pages)[ids] = poison_of(pages.dtype)


def allocate_pool(shape: Geometry, pages: int, device: torch.device, *, poison: bool) -> torch.Tensor:
    """The device pool [pages, *shape.sizes]. Raises ResourceExhausted naming the size that did not fit.

    `poison` fills it with what makes NaN: whatever reads a page before it was written shows at once.
    """
    try:
        pool = torch.empty((pages, *shape.sizes), dtype=shape.dtype, device=device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        size = format_bytes(pages * shape.bytes)
        raise ResourceExhausted(f"{size} on {device} did not fit: {error}", field="gpu_cache") from None
    if poison:
        movable(pool).fill_(poison_of(shape.dtype))
    return pool
